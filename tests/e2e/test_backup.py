"""A copy of the live data directory is a server again, and its clients get there by themselves (I2, I7, I12)."""

import pytest

from backups import Copy, Writers, check_copy, copy_in_order, copy_live, resync
from sandbox import Sandbox, differences, wait_for

pytestmark = pytest.mark.e2e


def test_copies_of_a_server_at_work_are_whole_and_clients_get_there_by_themselves(sandbox: Sandbox) -> None:
    server = sandbox.server()
    server.project()
    server.start()
    token = server.token("human:ana", "agent:*")
    ana = sandbox.client("ana")
    ana.add_remote(server, token)
    with Writers(server.url, token) as writers:
        wait_for(lambda: len(writers.acknowledged) >= 100 or writers.errors, "writes", 60)
        acknowledged = list(writers.acknowledged)
        copies = [Copy(sandbox, server, "rsync", copy_live), Copy(sandbox, server, "other", copy_in_order)]
        copied = len(writers.acknowledged)
        wait_for(lambda: len(writers.acknowledged) > copied or writers.errors, "the server to be ahead of them", 60)
    for copy in copies:
        check_copy(copy, token, acknowledged)
        assert resync(server, copy, token) == 1, copy.log.read_text()
        copy.stop()
    # The same address, as when a backup takes the place of a disk that was lost.
    server.stop()
    copies[0].port = server.port
    copies[0].start()
    wait_for(lambda: not differences(ana.lattice_dir, copies[0].lattice_dir()), "ana to have what the copy has", 40)
    copies[0].stop()
