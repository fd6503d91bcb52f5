"""Hostile arguments touch only their own project, and leave it valid (I9)."""

import os
from pathlib import Path

import pytest
from fuzz import Broken, Figures, run_batch
from observed_worker import Observer
from place import CANARY, Place
from values import ALL
from worker_process import ANA, WorkerProcess, answer_of, make_project

from lattice_remote.errors import ProtocolError
from lattice_remote.protocol.messages import Attachment, Refused, Reply, Run, decode_client_frame, encode
from lattice_remote.server.worker.policy import ROUTED


@pytest.mark.parametrize("seed", ["short 1", "short 2"])
def test_hostile_lines_stay_in_a_valid_project(seed: str) -> None:
    figures = Figures()
    run_batch(seed, 300, figures)
    assert figures.outcomes["ran"] > 30
    assert figures.outcomes["refused REMOTE_UNSUPPORTED"] > 30


def test_without_the_policy_no_line_leaves_the_project_either() -> None:
    figures = Figures()
    run_batch("short 3", 300, figures, unguarded=True)
    assert figures.outcomes["refused REMOTE_UNSUPPORTED by the hook"] > 0


def test_a_command_without_an_entry_is_refused(tmp_path: Path) -> None:
    with WorkerProcess(make_project(tmp_path / "web")) as worker:
        for path in ALL.keys() - ROUTED.keys():
            refused = worker.refused(*path.split())
            assert refused.code == "REMOTE_UNSUPPORTED"
            assert path in refused.message
        assert worker.run("create", "x", *ANA).seq == 1


@pytest.mark.parametrize(
    ("argv", "index"),
    [
        (["create", "x", *ANA], 0),
        (["create", "x", *ANA], 1),
        (["session", "start"], 1),
        (["comment", "LAT-1", "x", *ANA], 4),
        (["comment", "LAT-1", "x", "--name=X-1"], 3),
        (["comment", "LAT-1", "--file", "x", *ANA], 2),
        (["--help", "create"], 0),
        (["attach", "LAT-1", "--id=x", *ANA], 2),
    ],
)
def test_a_file_attached_to_another_argument_does_not_reveal_its_location(
    tmp_path: Path, argv: list[str], index: int
) -> None:
    with WorkerProcess(make_project(tmp_path / "web")) as worker:
        answer = answer_of(worker.run(*argv, files=[Attachment(index, "x.txt", b"content")]))
        assert isinstance(answer, Refused | Reply)
        text = answer.message if isinstance(answer, Refused) else (answer.stdout + answer.stderr).decode()
        assert str(tmp_path) not in text
        assert isinstance(answer, Refused) or answer.exit_code == 2
        assert not any((tmp_path / "web/tmp").iterdir())


@pytest.mark.parametrize("bad", [b"\xed\xa0\x80", b"\xff", b"\xc0\xaf", b"\xf4\x90\x80\x80", b"\xe2\x82"])
def test_invalid_utf_8_is_not_a_frame(bad: bytes) -> None:
    good = encode(Run("0" * 32, ["create", "?" * len(bad)]))
    with pytest.raises(ProtocolError):
        decode_client_frame(good.replace(b"?" * len(bad), bad))


def test_the_environment_of_the_server_does_not_affect_a_command(tmp_path: Path) -> None:
    environment = {
        "LATTICE_ROOT": "/",
        "LATTICE_NAME": "X-1",
        "_LATTICE_COMPLETE": "bash_source",
        "LATTICE_ACTOR": "a:b",
    }
    with WorkerProcess(make_project(tmp_path / "web"), environment=environment) as worker:
        assert "Created task" in worker.ok("create", "x", *ANA)
        assert worker.reply("create", "x").exit_code == 1


# --- these tests can fail ---


def test_a_read_or_changed_canary_is_detected(tmp_path: Path) -> None:
    place = Place(tmp_path)
    place.check()
    (tmp_path / "desk/notes.md").read_text()
    with pytest.raises(AssertionError, match=r"notes\.md"):
        place.check()
    (tmp_path / "home/new").touch()
    with pytest.raises(AssertionError, match="home/new"):
        place.check()


def test_the_observer_reports_what_the_capture_permits(tmp_path: Path) -> None:
    class Open:
        _thread = __import__("threading").get_ident()

    (tmp_path / "own").mkdir()
    (tmp_path / "own/link").symlink_to("../secret")
    report = os.open(tmp_path / "report", os.O_CREAT | os.O_RDWR)
    observer = Observer(Open(), [str(tmp_path / "own")], report)  # type: ignore[arg-type]
    observer.hook("open", (str(tmp_path / "own/x"), "r", 0))
    assert not (tmp_path / "report").read_text()
    observer.hook("open", (str(tmp_path / "own/link"), "r", 0))
    observer.hook("os.rename", (str(tmp_path / "own/x"), str(tmp_path / "x"), -1, -1))
    observer.hook("socket.connect", (None, ("127.0.0.1", 1)))
    assert [line.split()[0] for line in (tmp_path / "report").read_text().splitlines()] == [
        "open",
        "os.rename",
        "socket.connect",
    ]
    os.close(report)


def test_a_canary_in_a_reply_is_detected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fuzz._START", (["create", CANARY, *ANA],))
    with pytest.raises(Broken, match="a canary was read"):
        run_batch("short 4", 1, Figures())
