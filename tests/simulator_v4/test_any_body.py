# SPDX-License-Identifier: AGPL-3.0-or-later
"""Whatever a client sends, v4 answers it or refuses it; it never breaks, and neither does a task."""

from __future__ import annotations

import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import hypothesis
import hypothesis.strategies as st
import pytest
import trio

from replicator.simulator.v4.api import SCHEMA
from replicator.simulator.v4.filters import compile_filter
from replicator.simulator.v4.schema import Field
from replicator.simulator.web import HttpError
from tests.simulator_v4 import lab

_JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=8), inner, max_size=2)
    ),
    max_leaves=4,
)
_KNOWN = st.sampled_from(
    [lab.APP, lab.CLUSTER_A, lab.CLUSTER_B, lab.CONTAINER_A, lab.DATA_DISK, lab.VLAN10, lab.CENTRAL]
)  # fmt: skip
_PLAIN = {
    "uuid": _KNOWN,
    "task": st.just(f"ZXJnb24=:{lab.APP}"),
    "mac": st.just("50:6b:8d:00:00:09"),
    "time": st.sampled_from(
        ["2099-01-01T00:00:00Z", "9999-12-31T23:59:59-23:00", "2099-13-01T00:00:00Z"]
    ),
    "int": st.integers() | st.integers(0, 1 << 21),
    "bool": st.booleans(),
    "str": st.text(max_size=300) | st.text("ab-.:", min_size=12, max_size=14),
    "map": st.dictionaries(st.text(max_size=4), _JUNK, max_size=2)
    | st.just({"user": {"uuid": {"anyof": [lab.ADMIN, 5]}}}),
    "any": _JUNK,
}


def _value(spec: Field, depth: int) -> st.SearchStrategy[Any]:
    if spec.kind == "model":
        values = SCHEMA.models[spec.models[0]].values
        one = st.sampled_from(values) if values else st.one_of(
            *(_object(name, depth + 1) for name in spec.models)
        )  # fmt: skip
    else:
        one = _PLAIN[spec.kind]
    return st.lists(one, max_size=2) if spec.many else one


def _object(model: str, depth: int = 0) -> st.SearchStrategy[Any]:
    if depth > 6:
        return st.just({})
    fields = SCHEMA.models[model].fields
    required = {name: _value(spec, depth) for name, spec in fields.items() if spec.required}
    optional = {name: _value(spec, depth) for name, spec in fields.items() if not spec.required}
    typed = {"$objectType": st.just(model), **required}
    return st.fixed_dictionaries(typed, optional=optional)


_DP = "/api/dataprotection/v4.4/config/recovery-points"
_VM = f"/api/vmm/v4.3/ahv/config/vms/{lab.APP}"
_ENDPOINTS = [
    ("POST", "/api/vmm/v4.3/ahv/config/vms", "vmm.v4.ahv.config.Vm"),
    ("PUT", _VM, "vmm.v4.ahv.config.Vm"),
    ("POST", _VM + "/$actions/clone", "vmm.v4.ahv.config.CloneOverrideParams"),
    ("POST", _VM + "/disks", "vmm.v4.ahv.config.Disk"),
    ("POST", _VM + "/cd-roms", "vmm.v4.ahv.config.CdRom"),
    ("POST", _VM + "/nics", "vmm.v4.ahv.config.Nic"),
    ("POST", "/api/vmm/v4.3/ahv/config/vm-recovery-points", "vmm.v4.ahv.config.VmRecoveryPoint"),
    ("POST", _DP, "dataprotection.v4.config.RecoveryPoint"),
    ("POST", "/api/volumes/v4.3/config/volume-groups", "volumes.v4.config.VolumeGroup"),
    ("POST", "/api/networking/v4.4/config/subnets", "networking.v4.config.Subnet"),
    (
        "POST",
        "/api/clustermgmt/v4.3/config/storage-containers",
        "clustermgmt.v4.config.StorageContainer",
    ),
    ("POST", "/api/prism/v4.4/config/categories", "prism.v4.config.Category"),
    ("POST", "/api/iam/v4.0/authn/users", "iam.v4.authn.User"),
    ("POST", "/api/iam/v4.0/authz/roles", "iam.v4.authz.Role"),
    ("POST", "/api/iam/v4.0/authz/authorization-policies", "iam.v4.authz.AuthorizationPolicy"),
]


@pytest.mark.parametrize(("method", "path", "model"), _ENDPOINTS)
def test_no_body_breaks_it(method: str, path: str, model: str) -> None:
    @hypothesis.given(st.data())
    @hypothesis.settings(max_examples=25)
    def look(data: st.DataObject) -> None:
        # The restore-from-nothing of a body: often right in form, now and then no JSON object at all.
        body = data.draw(_object(model) | _JUNK)
        statuses.append(trio.run(_send, method, path, body))

    statuses: list[int] = []
    look()
    assert set(statuses) <= {200, 201, 202, 400, 404, 409, 422, 501}
    assert 400 in statuses


async def _send(method: str, path: str, body: Any) -> int:
    with tempfile.TemporaryDirectory() as folder:
        async with lab.asker(Path(folder)) as ask:
            tag = await ask.tag(_VM)
            answer = await ask(method, path, body, match=tag)
            if answer.status == 202:
                await ask.ended(answer)
            for listed in (_VM.rpartition("/")[0], _DP, "/api/volumes/v4.3/config/volume-groups"):
                assert (await ask("GET", listed)).status == 200
            return answer.status


@hypothesis.given(
    st.lists(
        st.sampled_from(
            [
                "name", "eq", "'app01'", "and", "or", "not", "(", ")", "in", ",", "contains", "disks/any(d:",
                "d/index", "5", "null", "powerState", "PowerState'ON'", "createTime", "2026-01-01T00:00:00Z", "gt",
                "cluster/extId", "startswith(name,'a')",
            ]
        ),
        max_size=9,
    ).map(" ".join)
    | st.text(max_size=30)
)  # fmt: skip
def test_no_filter_breaks_it(text: str) -> None:
    entity: dict[str, Any] = {"name": "app01", "powerState": "ON", "disks": [], "createTime": None}
    with suppress(HttpError):
        assert compile_filter(text, SCHEMA, "vmm.v4.ahv.config.Vm")(entity) in {True, False}
