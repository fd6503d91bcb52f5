"""The example configurations of NATS are valid, and differ only in the server's name."""

import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parents[3] / "examples/cluster"


def test_the_example_configurations_are_valid() -> None:
    texts = []
    for number in (1, 2, 3):
        file = EXAMPLES / f"nats-{number}.conf"
        program = Path(sys.executable).with_name("nats-server")
        done = subprocess.run(
            [program, "-t", "-c", file], env={"LATTICE_NATS_PASSWORD": "x"}, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        texts.append(file.read_text().replace(f"n{number}\n", "n\n").replace(f"server {number} of", "server of"))
    assert texts[0] == texts[1] == texts[2]
    assert "sync_interval: always" in texts[0]
