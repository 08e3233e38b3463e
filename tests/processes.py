"""Several JAX processes on this machine, that make up one mesh."""

import os
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

from programs import quickly

TESTS = Path(__file__).parent

START = """
import sys
import jax
jax.config.update("jax_num_cpu_devices", {devices})
jax.distributed.initialize(
    "127.0.0.1:{port}", num_processes={processes}, process_id=int(sys.argv[1])
)
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run(
    program: str,
    *,
    processes: int,
    devices: int = 1,
    seconds: float = 300,
    given: str = "",
    as_users_compile: bool = False,
):
    """What each of some processes prints that run a program after JAX's start."""
    start = START.format(devices=devices, port=free_port(), processes=processes)
    code = f"{start}{given}\n{textwrap.dedent(program)}"
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(TESTS)}
    if not as_users_compile:
        environment |= quickly()
    begun = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(i)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for i in range(processes)
    ]
    try:
        outputs = [process.communicate(timeout=seconds) for process in begun]
    finally:
        for process in begun:
            process.kill()
    for process, (_, errors) in zip(begun, outputs):
        assert process.returncode == 0, errors[-3000:]
    return [
        [line for line in out.splitlines() if not line.startswith("[Gloo]")]
        for out, _ in outputs
    ]
