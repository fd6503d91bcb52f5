"""Single faults, and many clients racing for one task; ``test_soak.py`` mixes all faults at random."""

import contextlib
import json

import pytest

from command_mix import Mix
from faults import three_people
from hook_record import Hooked
from sandbox import Sandbox, wait_for

pytestmark = pytest.mark.e2e


def test_a_quiet_random_mix_has_only_lattices_own_errors(sandbox: Sandbox) -> None:
    with three_people(sandbox) as (server, clients, _proxy):
        mix = Mix(server, clients, seed=7, commands=25)
        outcome = mix.run()
        ours = ("reach server", "connection", "token may", "undone", "internal")
        assert not [error for error in outcome.errors if any(word in error for word in ours)], outcome.errors
        assert outcome.check()["conflicts"] > 0
        Hooked(server).check_exactly_once_in_order()


def test_a_silent_network_hangs_no_command_and_the_client_catches_up(sandbox: Sandbox) -> None:
    with three_people(sandbox) as (_server, clients, proxy):
        ana, _ben, cem = clients
        ana.ok("create", "One", "--actor", "human:ana")
        proxy.stall()
        with contextlib.suppress(RuntimeError):
            cem.ok("list")
        stalled = ana.run("comment", "LAT-1", "into the void", "--actor", "human:ana", "--json")
        proxy.flow()
        written = json.loads(stalled.stdout)["ok"]
        wait_for(lambda: cem.run("remote", "verify").returncode == 0, "cem to be current again", 40)
        found = cem.ok("comments", "LAT-1").count("into the void")
        assert found <= 1
        assert found == 1 or not written


@pytest.mark.parametrize("racers", [10])
def test_of_many_clients_claiming_one_task_exactly_one_wins(sandbox: Sandbox, racers: int) -> None:
    with three_people(sandbox) as (_server, clients, _proxy):
        ana = clients[0]
        ana.ok("create", "The prize", "--actor", "human:ana")
        task = json.loads(ana.ok("show", "LAT-1", "--json"))["data"]["id"]
        plan = ana.lattice_dir / "plans" / f"{task}.md"
        plan.write_text(plan.read_text() + "\nA plan.\n")
        ana.ok("remote", "push")
        running = [
            clients[n % len(clients)].popen("next", "--claim", "--actor", f"agent:r{n}", "--json")
            for n in range(racers)
        ]
        answers = [json.loads(process.communicate(timeout=60)[0]) for process in running]
        winners = [a["data"]["assigned_to"] for a in answers if a["ok"] and a.get("data")]
        assert len(winners) == 1
        owner = json.loads(clients[2].ok("show", "LAT-1", "--json"))["data"]["assigned_to"]
        assert winners == [owner]
