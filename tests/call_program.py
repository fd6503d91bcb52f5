"""A program that has an operation of a surface carried out: ``surface_caller SURFACE NAME JSON``. Ends as commands do.

What a page of the dashboard or an MCP client does, without the page and the client. A page knows tasks by their ids;
here a path may name them by their short ones.
"""

import json
import re
import sys
from pathlib import Path


def main() -> int:
    from lattice_remote.client.agent_client import call
    from lattice_remote.client.plugin import remote_directory
    from lattice_remote.errors import RemoteError

    surface, name, payload = sys.argv[1:]
    directory = remote_directory()
    assert directory is not None, "started in a cache"
    ids = json.loads((Path(directory) / "ids.json").read_text())["map"]
    name = re.sub(r"LAT-\d+", lambda found: ids.get(found[0], found[0]), name)
    try:
        answer = call(directory, surface, name, payload)
    except RemoteError as error:
        sys.stderr.write(f"Error: {error.message}\n")
        return 1
    sys.stdout.write(answer.payload)
    if answer.status < 400:
        return 0
    sys.stderr.write(f"Error: {' '.join(answer.payload.split())}\n")
    return 1


if __name__ == "__main__":
    sys.exit(main())
