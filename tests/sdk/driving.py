# SPDX-License-Identifier: AGPL-3.0-or-later
"""What the drivers share. They run in an environment of the SDKs alone, so nothing of the project is imported here.

A driver reads one line of JSON that says where the simulator is, and then talks in lines: it asks the test for what only the
test can do (write into the VM, compare a file with a snapshot), and says ``{"done": …}`` at its end.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
import time
from inspect import signature
from pathlib import Path
from typing import Any

_POLLS = 3000
_POLL_S = 0.02
INITIATOR = "iqn.2026-01.org.example:dr-service-01"
TARGET_SECRET = "Tq8sN2vLx5Rz"


class Setting:
    """Where the simulator is: what the test wrote."""

    def __init__(self) -> None:
        given = json.loads(sys.stdin.readline())
        self.address: str = given["address"]
        self.port: int = given["port"]
        self.iscsi_port: int = given["iscsi_port"]
        self.ca: str = given["ca"]
        self.user: str = given["user"]
        self.password: str = given["password"]
        self.vm: str = given["vm"]
        self.folder = Path(given["folder"])
        self.image_url: str = given.get("image_url", "")
        self.image_ca_ok: bool = given.get("image_ca_ok", False)

    def client(self, namespace: str, address: str | None = None) -> Any:
        """An ApiClient of an SDK, for Prism Central, or without any account for an Element."""
        module = sdk(namespace)
        configuration = module.Configuration()
        configuration.scheme, configuration.port = "https", self.port
        configuration.host = address or self.address
        configuration.verify_ssl = True
        configuration.root_ca_certificate_file = self.ca
        configuration.backoff_factor, configuration.max_retry_attempts = 1, 3
        if address is None:
            configuration.username, configuration.password = self.user, self.password
            return module.ApiClient(configuration=configuration)
        # An Element knows no versions to negotiate; SDKs that are too old to negotiate do not know the argument either.
        negotiates = "allow_version_negotiation" in signature(module.ApiClient).parameters
        options = {"allow_version_negotiation": False} if negotiates else {}
        return module.ApiClient(configuration=configuration, **options)


def sdk(namespace: str) -> Any:
    """The module of a namespace's SDK."""
    return importlib.import_module(f"ntnx_{namespace}_py_client")


def ask(what: str, **more: Any) -> Any:
    """Have the test do something; its answer."""
    _say({"ask": what, **more})
    return json.loads(sys.stdin.readline())


def done(**facts: Any) -> None:
    """The driver came to its end."""
    _say({"done": facts})


def _say(what: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(what) + "\n")
    sys.stdout.flush()


class Tasks:
    """Waits for tasks, with the SDK of prism."""

    def __init__(self, setting: Setting) -> None:
        self._api = sdk("prism").TasksApi(setting.client("prism"))

    def wait(self, answer: Any) -> Any:
        """The task that an answer told of, once it has succeeded."""
        reference = answer.data
        assert type(reference).__name__ == "TaskReference", reference
        for _ in range(_POLLS):
            task = self._api.get_task_by_id(reference.ext_id).data
            assert type(task).__name__ == "Task", task
            if task.status in {"SUCCEEDED", "FAILED", "CANCELED"}:
                assert task.status == "SUCCEEDED", task
                return task
            time.sleep(_POLL_S)
        raise AssertionError(f"task {reference.ext_id} does not end")

    def entity(self, answer: Any, relation: str) -> str:
        """What a task worked on."""
        found = self.wait(answer).entities_affected
        return next(str(each.ext_id) for each in found if each.rel == relation)


def refused(status: int, call: Any, *arguments: Any, **options: Any) -> Any:
    """The body of the error that a call is refused with."""
    # Every SDK has an ApiException of its own.
    modules = [name for name in sys.modules if re.fullmatch(r"ntnx_\w+_py_client\.rest", name)]
    errors = tuple(sys.modules[name].ApiException for name in modules)
    try:
        call(*arguments, **options)
    except errors as error:
        if error.status != status:
            raise
        return json.loads(error.body)
    raise AssertionError(f"{call} was not refused")


def luns(setting: Setting, portal: str, target: str) -> list[tuple[str, int]]:
    """The LUNs of a volume group as an independent initiator finds them: target and number."""
    url = f"iscsi://{portal}:{setting.iscsi_port}"
    credentials = {
        "LIBISCSI_CHAP_USERNAME": INITIATOR,
        "LIBISCSI_CHAP_PASSWORD": TARGET_SECRET,
    }
    run = subprocess.run(
        ["iscsi-ls", "-i", INITIATOR, "-s", url],
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, **credentials},
    )
    # Where there is nothing to be shown, the tool calls that an error; what it does show is whole or it fails.
    assert not run.returncode or not run.stdout, (run.stderr, run.stdout)
    found: list[tuple[str, int]] = []
    name = ""
    for line in run.stdout.splitlines():
        match = re.match(r"Target:(\S+)", line)
        name = match[1] if match else name
        lun = re.match(r"Lun:(\d+)\s+Type:DIRECT_ACCESS", line)
        if lun and target in name:
            found.append((name, int(lun[1])))
    return found


def read_disk(setting: Setting, portal: str, target: str, lun: int, file: Path) -> None:
    """Read a whole LUN with qemu-img: nothing of the project, nothing of Nutanix."""
    options = (
        f"driver=iscsi,transport=tcp,portal={portal}:{setting.iscsi_port},target={target},lun={lun},"
        f"user={INITIATOR},password-secret=chap,initiator-name={INITIATOR}"
    )
    subprocess.run(
        [
            "qemu-img", "convert", "--object", f"secret,id=chap,data={TARGET_SECRET}",
            "--image-opts", options, "-O", "raw", str(file),
        ],
        check=True,
        timeout=120,
    )  # fmt: skip
