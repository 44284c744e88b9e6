# SPDX-License-Identifier: AGPL-3.0-or-later
"""The names of operations that roles grant, with the ids that v4 gives them."""

from __future__ import annotations

from typing import Final
from uuid import NAMESPACE_URL, uuid5

_NAMES = """
View_Cluster View_Subnet Create_Subnet Update_Subnet Delete_Subnet View_Storage_Container Create_Storage_Container
Update_Storage_Container Delete_Storage_Container View_Container View_Container_Datastore Update_Container_Disks View_Task
View_Project View_Category Create_Category Delete_Category View_Domain_Manager
View_Virtual_Machine View_Any_Virtual_Machine Create_Virtual_Machine Update_Virtual_Machine Delete_Virtual_Machine
View_Image Create_Image Update_Image Delete_Image
View_Recovery_Point Create_Recovery_Point Delete_Recovery_Point Replicate_Recovery_Point Set_Expiration_Time_Recovery_Point
View_VM_Recovery_Point Restore_VM_Recovery_Point Create_Vm_Snapshot
View_Volume_Group_Details View_Volume_Group_Disks View_Volume_Group_Metadata View_Volume_Group_iSCSI_Attachments
View_Volume_Group_VM_Attachments View_Volume_Group_Category_Associations Create_Volume_Group Delete_Volume_Group
Update_Volume_Group_Details_Internal Create_Volume_Group_Disk Delete_Volume_Group_Disk Update_Volume_Group_Disk_Internal
Attach_Volume_Group_To_External_iSCSI_Client Detach_Volume_Group_From_External_iSCSI_Client
View_External_iSCSI_Client Update_External_iSCSI_Client_Internal
View_User Create_User View_Role Create_Role Delete_Role View_Operation View_Authorization_Policy Create_Authorization_Policy
Delete_Authorization_Policy View_User_Key Create_User_Key Delete_User_Key
"""
#: All of them, sorted.
OPERATIONS: Final = tuple(sorted(_NAMES.split()))


def operation_id(name: str) -> str:
    """The id of an operation: always the same."""
    return str(uuid5(NAMESPACE_URL, f"replctl:operation:{name}"))


BY_ID: Final = {operation_id(name): name for name in OPERATIONS}
