"""Help with an example for each command of both programs, and shell completion."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer
from typer.main import get_command

from lattice_remote.client.cli.agent import agent_app as client_agent
from lattice_remote.client.cli.agent import launcher_app as client_launcher
from lattice_remote.client.cli.app import FAMILIES, app_with
from lattice_remote.client.cli.resolve import rescued_app as client_rescued
from lattice_remote.server.admin_cli import clusters, projects, tokens
from lattice_remote.server.cli import app as server_app
from sandbox import BIN


def commands(command: object, words: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], object]]:
    """Yield the words of each command of an app, and the command; groups are skipped."""
    children = getattr(command, "commands", None)
    if children is None:
        yield words, command
        return
    for name, child in children.items():
        yield from commands(child, (*words, name))


client_app = app_with()
ALL = [
    *commands(get_command(client_app), ("lattice", "remote")),
    *commands(get_command(server_app), ("lattice-remote",)),
]


@pytest.mark.parametrize(("words", "command"), ALL, ids=[" ".join(words) for words, _ in ALL])
def test_help_has_an_example_of_the_command(words: tuple[str, ...], command: object) -> None:
    help_ = " ".join(str(command.help).split())  # type: ignore[attr-defined]
    example = help_.partition("Example: ")[2]
    program, rest = ("lattice remote", words[2:]) if words[0] == "lattice" else (words[0], words[1:])
    assert program in example and " ".join(rest) in example, f"no 'Example: {' '.join(words)}' in: {help_}"
    undescribed = [p.name for p in command.params if getattr(p, "opts", [""])[0].startswith("-") and not p.help]  # type: ignore[attr-defined]
    assert not undescribed, f"options without a help text: {undescribed}"


def test_usage_has_arguments_in_capitals_with_one_pair_of_brackets() -> None:
    for words, command in ALL:
        context = command.make_context(words[-1], [], resilient_parsing=True)  # type: ignore[attr-defined]
        assert not re.search(r"<(str|int|bool|path)", command.get_help(context).partition("Options:")[2]), words  # type: ignore[attr-defined]
        for piece in command.collect_usage_pieces(context):  # type: ignore[attr-defined]
            assert piece == piece.upper() and piece.count("[") + piece.count("{") <= 1, f"{' '.join(words)}: {piece}"


@pytest.mark.parametrize(
    "app", [client_app, client_rescued, client_agent, client_launcher, server_app, projects, tokens, clusters]
)
def test_the_list_of_commands_has_whole_sentences(app: typer.Typer) -> None:
    command = get_command(app)
    context = command.make_context("lattice remote", [], resilient_parsing=True, terminal_width=80)
    listed = command.get_help(context).partition("Commands:")[2].splitlines()
    assert len(listed) > 2 and [line for line in listed if line.endswith("...")] == []


def test_a_command_loads_only_its_group() -> None:
    assert {family: tuple(get_command(app_with([family])).commands) for family in FAMILIES} == FAMILIES


def complete(shell: str, words: str, env: dict[str, str]) -> list[str]:
    """Return the completions of ``lattice WORDS`` that a shell receives from Click; the last word is incomplete."""
    typed = f"lattice {words}"
    number = typed.count(" ")
    place = typed.rpartition(" ")[2] if shell == "fish" else str(number)
    asked = {"COMP_WORDS": typed, "COMP_CWORD": place, "_LATTICE_COMPLETE": f"{shell}_complete"}
    done = subprocess.run([BIN / "lattice"], env={**env, **asked}, capture_output=True, text=True, check=True)
    assert not done.stderr
    return done.stdout.splitlines()


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    path = f"{BIN}{os.pathsep}{os.environ['PATH']}"
    return {"HOME": str(tmp_path), "PATH": path, "LANG": "C.UTF-8"}


def test_bash_completes_commands_and_options_below_lattice_remote(environment: dict[str, str], tmp_path: Path) -> None:
    ask = (
        "COMPREPLY=(); COMP_WORDS=({0}); COMP_CWORD=$((${{#COMP_WORDS[@]}}-1)); "
        '_lattice_completion lattice; echo "${{COMPREPLY[@]}}"'
    )
    lines = [f"lattice remote {rest}" for rest in ("wa", "watch --si", "agent st", "nothing x", '""')]
    script = 'eval "$(_LATTICE_COMPLETE=bash_source lattice)"\n' + "\n".join(ask.format(line) for line in lines)
    done = subprocess.run(
        ["bash", "--norc", "-c", script], env=environment, cwd=tmp_path, capture_output=True, text=True, check=True
    )
    *some, all_ = done.stdout.splitlines()
    assert some == ["watch", "--since", "status stop", ""]
    assert {"add", "status", "watch", "agent"} <= set(all_.split()) and not done.stderr


def test_zsh_and_fish_receive_kind_value_and_help(environment: dict[str, str]) -> None:
    assert complete("zsh", "remote wa", environment) == ["plain", "watch", "Show changes as they arrive."]
    assert complete("fish", "remote wa", environment) == ["plain,watch\tShow changes as they arrive."]


def test_names_in_a_cache_are_completed_without_server_agent_or_heavy_imports(
    environment: dict[str, str], tmp_path: Path
) -> None:
    place = tmp_path / ".lattice"
    (place / "tasks").mkdir(parents=True)
    (place / "remote.json").write_text('{"url": "https://board.invalid", "project": "web"}')
    (place / "ids.json").write_text(json.dumps({"map": {f"WEB-{n}": f"task_{n}" for n in (1, 2, 10)}, "next_seq": 11}))
    (place / "tasks/task_1.json").write_text('{"title": "Write \\u001b[2J it"}')
    files = sorted(tmp_path.rglob("*"))
    env = {**environment, "LATTICE_ROOT": str(tmp_path), "LATTICE_REMOTE_RUNTIME_DIR": str(tmp_path / "run")}
    everything = ["plain,WEB-1\tWrite  [2J it", "plain,WEB-2", "plain,WEB-10"]
    for words in ("show WEB", "show w", "archive WEB-1 WEB", "link WEB-1 blocks W", "remote log --task WEB"):
        assert complete("fish", words, env) == everything, words
    assert complete("fish", "remote history WEB-10", env) == complete("fish", "status WEB-10", env) == ["plain,WEB-10"]
    for words in ("remote pull o", "remote rename o", "remote get-url o"):
        assert complete("fish", words, env) == ["plain,origin\thttps://board.invalid/web"], words
    assert complete("fish", "remote config p", env) == ["plain,payloads"]
    assert complete("fish", "remote config payloads o", env) == ["plain,on-demand"]
    (place / "ids.json").write_text("[" * 100_000)
    assert "".join(complete("fish", "show WEB", env) + complete("fish", "remote history WEB", env)) == ""
    assert sorted(tmp_path.rglob("*")) == files
    asked = {"COMP_WORDS": "lattice show WEB", "COMP_CWORD": "WEB", "_LATTICE_COMPLETE": "fish_complete"}
    script = "import atexit, sys; atexit.register(lambda: print(*sys.modules, file=sys.stderr))\n"
    script += "from lattice.cli.main import cli; cli(prog_name='lattice')"
    done = subprocess.run(
        [sys.executable, "-c", script], env={**env, **asked}, capture_output=True, text=True, check=False
    )
    loaded = set(done.stderr.split())
    assert "lattice_remote.client.tasks" in loaded
    assert loaded.isdisjoint({"msgspec", "websockets", "typer", "ssl", "lattice_remote.client.routing"})
    script = script.replace("from lattice.cli.main import cli; cli(prog_name='lattice')", "")
    script += "from lattice_remote.client.cli.app import app_with; app_with()"
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, check=True)
    assert "typer" in done.stderr.split() and set(done.stderr.split()).isdisjoint({"websockets", "watchfiles"})


def test_the_server_program_has_completion(environment: dict[str, str]) -> None:
    def ask(*argv: str, **more: str) -> str:
        env = {**environment, **more}
        return subprocess.run(argv, env=env, capture_output=True, text=True, check=True).stdout

    program = str(BIN / "lattice-remote")
    script = ask("bash", "-c", f"{program} --show-completion; true")  # the program detects its parent shell
    assert "complete -o default -F _lattice_remote_completion lattice-remote" in script
    completed = ask(
        program, COMP_WORDS="lattice-remote project cr", COMP_CWORD="2", _LATTICE_REMOTE_COMPLETE="complete_bash"
    )
    assert completed.split() == ["create"]
    assert "--install-completion" in ask(program, "--help")
