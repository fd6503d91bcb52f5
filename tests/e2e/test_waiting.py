"""``resource acquire --wait``: served in order and at once, blocking nothing; a lost waiter acquires nothing."""

import json
import os
import signal
import subprocess
from concurrent.futures import ThreadPoolExecutor

import pytest
import requests

from lattice_remote.server import status as statussocket
from sandbox import Client, Sandbox, Server, wait_for

pytestmark = pytest.mark.e2e

ANA = ("--actor", "human:ana")


def holders(server: Server) -> list[str]:
    snapshot = json.loads((server.lattice_dir() / "resources/gpu/resource.json").read_text())
    return [holder["actor"] for holder in snapshot["holders"]]


def waiters(server: Server) -> int:
    """Return the running server's number of queued requests, after their first attempts."""
    status = statussocket.ask(server.data)
    assert status is not None, "the server runs"
    return sum(project["waiting"] for project in json.loads(status)["projects"])


class Board:
    """A server with a resource that Ana holds, and three clients on two machines."""

    def __init__(self, sandbox: Sandbox) -> None:
        self.server = sandbox.server()
        self.server.project()
        self.server.start()
        self.clients = [sandbox.client(name, machine) for name, machine in (("a", "one"), ("b", "one"), ("c", "two"))]
        self.tokens = [self.server.token(f"human:{c.dir.name}", "human:ana", "agent:*") for c in self.clients]
        for client, token in zip(self.clients, self.tokens, strict=True):
            client.add_remote(self.server, token)
        self.ana = self.clients[0]
        self.ana.ok("resource", "create", "gpu", "--ttl", "300", *ANA)
        self.ana.ok("resource", "acquire", "gpu", *ANA)

    def wait(self, client: Client, actor: str, *more: str) -> "subprocess.Popen[str]":
        """Start waiting as an agent, and return once the request is queued."""
        before = waiters(self.server)
        process = client.popen("resource", "acquire", "gpu", "--wait", "--actor", f"agent:{actor}", *more)
        wait_for(lambda: waiters(self.server) > before, "it to stand in line")
        return process

    def release(self, actor: str) -> None:
        self.ana.ok("resource", "release", "gpu", "--actor", actor)


@pytest.fixture
def board(sandbox: Sandbox) -> Board:
    return Board(sandbox)


def test_waiters_of_several_machines_are_served_in_order_across_a_killed_worker(board: Board) -> None:
    waiting = [board.wait(board.clients[n % 3], f"w{n}", "--timeout", "60") for n in range(5)]
    board.release("human:ana")
    for n, process in enumerate(waiting):
        out, err = process.communicate(timeout=30)
        assert (process.returncode, err) == (0, "") and out.startswith("Acquired 'gpu' (expires ")
        assert holders(board.server) == [f"agent:w{n}"]
        if n == 2:
            (pid,) = board.server.worker_pids()
            os.kill(pid, signal.SIGKILL)
        board.release(f"agent:w{n}")
    assert holders(board.server) == []


@pytest.mark.parametrize("how", ["ctrl-c", "killed"])
def test_a_lost_waiter_acquires_nothing_and_lets_the_next_one_through(board: Board, how: str) -> None:
    first = board.wait(board.clients[1], "gone", "--timeout", "60")
    second = board.wait(board.clients[2], "next", "--timeout", "60")
    before = waiters(board.server)
    first.send_signal(signal.SIGINT if how == "ctrl-c" else signal.SIGKILL)
    first.communicate(timeout=20)
    wait_for(lambda: waiters(board.server) < before, "the server to have noticed")
    board.release("human:ana")
    assert second.communicate(timeout=30)[0].startswith("Acquired")
    assert holders(board.server) == ["agent:next"]
    board.release("agent:next")
    assert holders(board.server) == []


def test_a_restarted_server_and_a_killed_agent_lose_no_waiter_and_no_position(board: Board) -> None:
    first = board.wait(board.clients[2], "first", "--timeout", "60")
    second = board.wait(board.clients[1], "second", "--timeout", "60")
    status = json.loads(board.clients[2].ok("remote", "agent", "status", "--json"))["data"]
    os.kill(status["pid"], signal.SIGKILL)
    board.server.kill()
    board.server.start()
    wait_for(lambda: waiters(board.server) == 2, "both to stand in line again", 60)
    board.release("human:ana")
    assert first.communicate(timeout=30)[0].startswith("Acquired"), "it has its place, though it came back last"
    assert holders(board.server) == ["agent:first"] and second.poll() is None
    board.release("agent:first")
    assert second.communicate(timeout=30)[0].startswith("Acquired")
    log = json.loads(board.ana.ok("remote", "log", "--json", "-n", "50"))["data"]["entries"]
    acquired = [entry["actor"] for entry in log if "acquire gpu --wait" in entry["command"]]
    assert acquired == ["agent:second", "agent:first"], "each once"


def test_a_waiter_with_a_revoked_token_is_refused_on_every_surface_and_acquires_nothing(board: Board) -> None:
    server = board.server
    command = board.wait(board.clients[2], "cem", "--timeout", "60")
    url, text = f"http://127.0.0.1:{server.port}/projects/board", board.tokens[2]
    tokens = {token["actor"]: token["id"] for token in json.loads(server.admin("token", "list", "--json"))}

    def acquire() -> requests.Response:
        body = {"actor": "agent:eve", "wait": True, "timeout": 60}
        headers = {"Authorization": f"Bearer {text}"}
        return requests.post(f"{url}/resources/gpu/acquire", json=body, headers=headers, timeout=60)

    with ThreadPoolExecutor(1) as pool:
        over_http = pool.submit(acquire)
        wait_for(lambda: waiters(server) == 2, "both to stand in line")
        server.admin("token", "revoke", tokens["human:c"])
        answer = over_http.result(30)
    why = f"token {tokens['human:c']} was revoked; nothing was changed"
    assert (answer.status_code, answer.json()["error"]) == (401, {"code": "REMOTE_UNAUTHORIZED", "message": why})
    assert answer.headers["WWW-Authenticate"] == "Bearer"
    out, err = command.communicate(timeout=30)
    assert (command.returncode, out) == (1, "") and why in err and err.count("\n") == 1, err
    assert waiters(server) == 0
    board.release("human:ana")
    assert holders(server) == []


def test_expiry_wakes_a_waiter_and_texts_and_codes_are_local_lattices(board: Board, sandbox: Sandbox) -> None:
    local = sandbox.client("local")
    local.ok("init", "--project-code", "LAT", "--no-setup-claude", "--no-setup-agents", *ANA)
    for client, name in ((local, "cpu"), (board.ana, "cpu")):
        client.ok("resource", "create", name, "--ttl", "2", *ANA)
        client.ok("resource", "create", "held", *ANA)
        client.ok("resource", "create", "free", *ANA)
        client.ok("resource", "acquire", "held", *ANA)

    def told(client: Client, *argv: str) -> tuple[int, str, str]:
        done = client.run("resource", "acquire", *argv, "--wait", "--actor", "agent:b")
        return done.returncode, done.stdout, done.stderr

    assert told(board.ana, "held", "--timeout", "1") == told(local, "held", "--timeout", "1")
    assert told(board.ana, "held", "--timeout", "0", "--json") == told(local, "held", "--timeout", "0", "--json")
    assert told(board.ana, "nothing", "--timeout", "1") == told(local, "nothing", "--timeout", "1")
    for client in (local, board.ana):
        client.ok("resource", "acquire", "cpu", *ANA)
    assert told(board.ana, "cpu", "--timeout", "60") == (0, "Acquired 'cpu' (expires 2s)\n", "")
    assert told(local, "cpu", "--timeout", "60")[:2] == (0, "Acquired 'cpu' (expires 2s)\n")
    assert told(board.ana, "free") == told(local, "free")
    assert told(board.ana, "free")[1] == told(local, "free")[1] == "Already holding 'free' (TTL extended)\n"
