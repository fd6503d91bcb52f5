"""Recorded description of a command: identifying, bounded and without credentials."""

import time

from lattice_remote.server.worker.policy import MAX_CHARS, describe_command, describe_paths


def test_a_command_is_recorded_as_it_could_be_typed() -> None:
    assert describe_command(["comment", "LAT-1", "it's done"]) == """comment LAT-1 'it'"'"'s done'"""


def test_a_long_command_is_cut() -> None:
    shown = describe_command(["comment", "LAT-1", "x" * 1_000_000])
    assert len(shown) == MAX_CHARS and shown.endswith("…")


def test_tokens_and_passwords_are_struck_out() -> None:
    token = "ltr_" + "aB3_-" * 9
    assert token not in describe_command(["comment", "LAT-1", f"use {token}!"])
    shown = describe_command(["attach", "LAT-1", "https://ana:s3cret@example.org/x"])
    assert "s3cret" not in shown and "https://ana:***@example.org/x" in shown


def test_a_token_at_the_cut_does_not_show_either() -> None:
    token = "ltr_" + "S" * 43
    for before in range(100, 2000, 3):
        assert "SS" not in describe_command(["comment", "LAT-1", "x" * before + " " + token])


def test_a_hostile_line_takes_no_time() -> None:
    began = time.process_time()
    for hostile in ("http", "://", "://a:", "ltr_", "ltr_a ", "'"):
        describe_command([hostile * 100_000] * 1000)
    assert time.process_time() - began < 1.0


def test_files_found_changed_are_named_and_counted() -> None:
    assert describe_paths(["a", "b"]) == "changed a, b"
    assert describe_paths([f"f{n}" for n in range(9)]) == "changed f0, f1, f2, f3, f4, and 4 more"
    shown = describe_paths(["p" * 300 + str(n) for n in range(9)])
    assert len(shown) == MAX_CHARS and shown.endswith(", and 4 more")
