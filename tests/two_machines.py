"""Two machines as TCP and MPI see them: network namespaces with host names of their own.

One cable is between them, which can be pulled; a stand-in for ssh goes from one to the other.
"""

import os
import subprocess
import sys
from pathlib import Path

BIN = Path(sys.executable).parent
ADDRESSES = ("10.77.0.1", "10.77.0.2")
INTERFACE = "slow0"

# Options, then the host, then words that a remote shell puts together and reads again.
SSH = """#!/bin/sh
while :; do
  case $1 in
    -o) shift 2;;
    -*) shift;;
    *) break;;
  esac
done
case $1 in
  {addresses[0]}) name=node1 namespace={namespaces[0]};;
  {addresses[1]}) name=node2 namespace={namespaces[1]};;
  *) echo "ssh: $1: unknown host" >&2; exit 255;;
esac
shift
exec ip netns exec $namespace unshare --uts sh -c 'hostname $0; exec sh -c "$1"' $name "$*"
"""


class TwoMachines:
    """In the namespaces of a SlowNetwork."""

    def __init__(self, network, folder):
        self._namespaces = network.nodes
        self._folder = folder / "bin"
        self._folder.mkdir()
        ssh = self._folder / "ssh"
        ssh.write_text(SSH.format(addresses=ADDRESSES, namespaces=network.nodes))
        ssh.chmod(0o755)

    def start(self, node, command, **environ):
        """A process on machine 0 or 1; what it says is read by its `communicate`."""
        named = ["unshare", "--uts", "sh", "-c", 'hostname $0; exec "$@"', f"node{node + 1}"]
        environ = {
            "DS_ACCELERATOR": "cpu",
            "OMP_NUM_THREADS": "1",
            "PATH": f"{self._folder}:{BIN}:{os.environ['PATH']}",
        } | environ
        return subprocess.Popen(
            ["ip", "netns", "exec", self._namespaces[node], *named, *command],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=os.environ | environ,
        )

    def pull_the_cable(self):
        self._switch("down")

    def put_it_back(self):
        self._switch("up")

    def _switch(self, state):
        command = ["ip", "-n", self._namespaces[1], "link", "set", INTERFACE, state]
        subprocess.run(command, check=True)
