"""A Hugging Face Hub on this machine: enough of its protocol for the real clients, and faults on request.

    with HubStandIn() as hub:
        hub.fail("500", times=1, path="POST .*/commit/")
        subprocess.run([...], env={**os.environ, **hub.environment(tmp_path / "home")})
        assert "model.safetensors" in hub.files("user/name")

`environment` is for another process, which is the way that needs no knowledge of the clients; `patch` points the
clients of this process at the stand-in.
"""

from .contents import Commit, Repository, Request
from .protocol import OTHER_TOKEN, READ_ONLY_TOKEN, TOKEN, USER
from .server import FAULTS, HubStandIn

__all__ = [
    "FAULTS",
    "OTHER_TOKEN",
    "READ_ONLY_TOKEN",
    "TOKEN",
    "USER",
    "Commit",
    "HubStandIn",
    "Repository",
    "Request",
]
