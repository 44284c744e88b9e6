# SPDX-License-Identifier: AGPL-3.0-or-later
"""What the account may do, by v3: permissions count, names of roles only where they say everything."""

from __future__ import annotations

from pathlib import Path

import pytest

from replicator.prism.types import BACKUP, CLUSTERS, VMS
from replicator.prism.v3 import PrismV3
from tests.prism.lab import PE, Asked, Said, scripted
from tests.prism_v3.fake import PERMISSIONS, Fake, refused


async def rights(tmp_path: Path, fake: Fake) -> dict[str, set[tuple[bool | None, str | None]]]:
    """What was seen for each duty: granted, and what is lacking."""
    async with scripted(tmp_path, fake) as (_, hosts):
        found = await PrismV3(hosts).access()
    return {
        duty: {(each.granted, each.lacks) for each in found if each.duty == duty}
        for duty in (BACKUP, VMS, CLUSTERS)
    }


ALL = {(True, None)}


@pytest.mark.parametrize(
    ("user", "roles"),
    [
        ("admin", {}),
        ("svc-dr", {"Prism Admin": ()}),
        ("svc-dr", {"Super Admin": (), "Developer": ()}),
        ("svc-dr", {"Replication": tuple(PERMISSIONS)}),
    ],
)
async def test_an_account_that_may_do_all_of_it(
    tmp_path: Path, user: str, roles: dict[str, tuple[str, ...]]
) -> None:
    found = await rights(tmp_path, Fake(user=user, roles=roles))
    assert found == {BACKUP: ALL, VMS: ALL, CLUSTERS: ALL}


async def test_a_role_that_may_only_look_says_all_that_it_lacks(tmp_path: Path) -> None:
    viewer = {"Prism Viewer": ("View_Cluster", "View_Virtual_Machine")}
    found = await rights(tmp_path, Fake(user="svc-dr", roles=viewer))
    assert (False, "Create_Volume_Group, Delete_Volume_Group") in found[BACKUP]
    ((_, lacks),) = [each for each in found[VMS] if each[0] is False]
    wanted = [name for name in PERMISSIONS if "Machine" in name or "Image" in name]
    assert lacks is not None
    assert set(lacks.split(", ")) == {name for name in wanted if not name.startswith("View_")}
    assert found[CLUSTERS] == ALL


async def test_a_user_named_admin_of_a_directory_is_not_the_local_administrator(
    tmp_path: Path,
) -> None:
    fake = Fake()
    fake.before = lambda asked: (
        Said(200, {"user_details": {"username": "admin", "user_type": "DIRECTORY_SERVICE"}})
        if asked.path.endswith("users/info")
        else None
    )
    found = await rights(tmp_path, fake)
    assert all((None, None) in seen for seen in found.values())


async def test_roles_that_cannot_be_seen_are_unknown_and_not_refused(tmp_path: Path) -> None:
    fake = Fake()
    fake.before = lambda asked: refused(403, "ACCESS_DENIED") if "/users/" in asked.path else None
    found = await rights(tmp_path, fake)
    assert all(seen == {(True, None), (None, None)} for seen in found.values())


@pytest.mark.parametrize(
    ("path", "duty", "lacks"),
    [
        ("vms/list", VMS, "View_Virtual_Machine"),
        ("volume_groups/list", BACKUP, "View_Volume_Group_Details"),
        ("images/list", VMS, "View_Image"),
    ],
)
async def test_a_list_that_is_refused_names_the_permission(
    tmp_path: Path, path: str, duty: str, lacks: str
) -> None:
    fake = Fake()
    fake.before = lambda asked: refused(403, "ACCESS_DENIED") if asked.path.endswith(path) else None
    assert (False, lacks) in (await rights(tmp_path, fake))[duty]


async def test_an_account_that_the_element_does_not_know(tmp_path: Path) -> None:
    def foreign(asked: Asked) -> Said | None:
        html = {"content-type": "text/html"}
        return Said(401, b"<html>who?</html>", html) if asked.host == PE else None

    async with scripted(tmp_path, Fake(before=foreign)) as (_, hosts):
        found = [each for each in await PrismV3(hosts).access() if each.granted is False]
    assert {each.duty for each in found} == {BACKUP}
    assert all(each.lacks is None for each in found)
    assert all("prism_element_user" in str(each.remedy) for each in found)
    assert found[0].detail.startswith("the Element does not accept the account for snapshots (")


async def test_an_element_without_changed_regions_is_a_warning(tmp_path: Path) -> None:
    fake = Fake()
    fake.before = lambda asked: (
        refused(404, "ENTITY_NOT_FOUND") if asked.path.endswith("changed_regions") else None
    )
    assert (None, "data/changed_regions") in (await rights(tmp_path, fake))[BACKUP]
