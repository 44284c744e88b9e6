# SPDX-License-Identifier: AGPL-3.0-or-later
"""What the server needs of v4: its routers, who a token belongs to, how errors look."""

from __future__ import annotations

from typing import TYPE_CHECKING

from replicator.simulator.model import User
from replicator.simulator.v4 import (
    clustermgmt,
    dataprotection,
    iam,
    images,
    jwt,
    networking,
    prism,
    vm_devices,
    vm_restore,
    vmm,
    volumes,
)
from replicator.simulator.v4.api import Api, unknown_path
from replicator.simulator.v4.envelope import render_error
from replicator.simulator.v4.knobs import NEWEST
from replicator.simulator.web import Handler, Reply, Request, Router

if TYPE_CHECKING:
    from replicator.simulator.core import Core

_APIS = "v4_api"


def _api(core: Core) -> Api:
    """The one of this core: the key that tokens are signed with is the same on Prism Central and its Elements."""
    found = core.__dict__.get(_APIS)
    if found is None:
        found = core.__dict__[_APIS] = Api(core)
    assert isinstance(found, Api)
    return found


def build_v4(core: Core) -> dict[str, Router]:
    """The routers of Prism Central ("pc") and of the Elements ("element")."""
    api = _api(core)
    central, element = Router(), Router()
    for namespace in NEWEST:
        central.add("OPTIONS", f"/api/{namespace}/unversioned/info", _info(api, namespace))
    for add in (
        vmm.add,
        vm_devices.add,
        vm_restore.add,
        images.add,
        volumes.add,
        clustermgmt.add,
        networking.add,
        prism.add,
        iam.add,
        dataprotection.add_central,
    ):
        add(api, central)
    dataprotection.add_element(api, element)
    return {"pc": central, "element": element}


def _info(api: Api, namespace: str) -> Handler:
    async def answer(request: Request) -> Reply:
        del request
        window = api.knobs.window.get(namespace)
        info = api.knobs.info
        if window is None or info == "missing":
            return unknown_path()
        return Reply(200, {"data": f"v4.{window[1]}" if info == "highest" else info})

    return answer


def authenticate_jwt(
    core: Core, request_path: str, token: str, cluster: str | None = None
) -> User | None:
    """Whose token the cookie of a request to ``cluster``'s Element holds; None: it is none of v4's tokens.

    Raises HttpError 401 for a token that is not good (any more) for this path.
    """
    return jwt.open_token(core, _api(core).knobs.key, request_path, token, cluster)


__all__ = ["authenticate_jwt", "build_v4", "render_error"]
