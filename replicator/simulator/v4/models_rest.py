# SPDX-License-Identifier: AGPL-3.0-or-later
"""The models of all namespaces but vmm and iam, as ``schema`` reads them."""

from __future__ import annotations

from typing import Final

COMMON: Final = r"""
common.v1.response.ApiLink
  href str
  rel str
common.v1.config.KVPair
  name str 3..128
  value any
common.v1.config.Flag
  name str 3..128
  value bool
common.v1.response.ApiResponseMetadata
  flags [common.v1.config.Flag]
  links [common.v1.response.ApiLink]
  totalAvailableResults int
  extraInfo [common.v1.config.KVPair]
common.v1.config.Message
  code str
  message str
  locale str
  severity ~MessageSeverity
common.v1.config.MessageSeverity = INFO WARNING ERROR
common.v1.config.IPAddress
  ipv4 ~IPv4Address
  ipv6 ~IPv6Address
common.v1.config.IPv4Address
  value str /((25[0-5]|2[0-4]\d|1?\d?\d)(\.(?!$)|$)){4}/ !
  prefixLength int 0..32
common.v1.config.IPv6Address
  value str !
  prefixLength int 0..128
common.v1.config.IPAddressOrFQDN
  ipv4 ~IPv4Address
  ipv6 ~IPv6Address
  fqdn ~FQDN
common.v1.config.FQDN
  value str
common.v1.config.EntityReference
  extId uuid
  name str ..256
  uris [str]
  entityType ~EntityType
common.v1.config.EntityType = CLUSTER VM STORAGE_CONTAINER VOLUME_GROUP TASK IMAGE CATEGORY NODE VPC SUBNET ROUTING_POLICY FLOATING_IP VPN_GATEWAY VPN_CONNECTION DIRECT_CONNECT DIRECT_CONNECT_VIF VIRTUAL_NIC VIRTUAL_SWITCH VM_DISK VOLUME_DISK DISK_RECOVERY_POINT VTEP_GATEWAY RECOVERY_PLAN RECOVERY_PLAN_JOB AVAILABILITY_ZONE VIRTUAL_NETWORK CONSISTENCY_GROUP SUBNET_EXTENSION
"""  # noqa: E501 - a line is an enum

DATAPROTECTION: Final = r"""
dataprotection.v4.config.RecoveryPoint
  extId uuid
  links [common.v1.response.ApiLink]
  tenantId uuid
  ownerExtId uuid
  locationReferences [~LocationReference]
  vmRecoveryPoints [~VmRecoveryPoint]
  volumeGroupRecoveryPoints [~VolumeGroupRecoveryPoint]
  isSecure bool @1
  locationAgnosticId str
  projectExtId str @4
  name str ..256
  creationTime time
  expirationTime time
  status dataprotection.v4.common.RecoveryPointStatus
  recoveryPointType dataprotection.v4.common.RecoveryPointType
  totalExclusiveUsageBytes int @2
  sourceLocation any @2
dataprotection.v4.config.VmRecoveryPoint +
  hypervisorType ~HypervisorType @1
  consistencyGroupExtId str
  diskRecoveryPoints [dataprotection.v4.common.DiskRecoveryPoint]
  vmExtId uuid
  vmCategories [str]
  applicationConsistentProperties dataprotection.v4.common.VssProperties
  locationAgnosticId str
  projectExtId str @4
  name str ..256
  creationTime time
  expirationTime time
  status dataprotection.v4.common.RecoveryPointStatus
  recoveryPointType dataprotection.v4.common.RecoveryPointType
  totalExclusiveUsageBytes int @2
  sourceLocation any @4
dataprotection.v4.config.HypervisorType = AHV ESXI
dataprotection.v4.config.VolumeGroupRecoveryPoint +
  volumeGroupExtId uuid
dataprotection.v4.common.DiskRecoveryPoint
  diskRecoveryPointExtId uuid
  diskExtId uuid
dataprotection.v4.config.LocationReference
  locationExtId uuid
dataprotection.v4.common.RecoveryPointType = CRASH_CONSISTENT APPLICATION_CONSISTENT
dataprotection.v4.common.RecoveryPointStatus = COMPLETE
dataprotection.v4.common.VssProperties
  backupType ~BackupType !
  shouldIncludeWriters bool
  writers [str]
  shouldStoreVssMetadata bool
dataprotection.v4.common.BackupType = FULL_BACKUP COPY_BACKUP
dataprotection.v4.config.ExpirationTimeSpec
  expirationTime time !
dataprotection.v4.config.RecoveryPointRestorationSpec
  clusterExtId uuid
  vmRecoveryPointRestoreOverrides [~VmRecoveryPointRestoreOverride]
  volumeGroupRecoveryPointRestoreOverrides [any]
  isInstantRestore bool @3
dataprotection.v4.config.VmRecoveryPointRestoreOverride
  vmRecoveryPointExtId uuid
  isStrictMode bool @1
  vmOverrideSpec ~AhvVmOverrideSpec|~EsxiVmOverrideSpec @1
dataprotection.v4.config.EsxiVmOverrideSpec @1
  name str
dataprotection.v4.config.AhvVmOverrideSpec
  name str ..80
  description str @1
  nicSpec vmm.v4.ahv.config.VmRestoreNicConfigSpecification @1
  categories [vmm.v4.ahv.config.CategoryReference] @1
  projectExtId str @4
  ownershipInfo vmm.v4.ahv.config.OwnershipInfo @1
  guestToolsSpec any @2
  biosSpec any @4
dataprotection.v4.config.RecoveryPointReplicationSpec
  pcExtId uuid !
  clusterExtId uuid
dataprotection.v4.content.ClusterDiscoverSpec
  operation ~ClusterDiscoverOperation !
  spec ~ComputeChangedRegionsClusterDiscoverSpec|~GetVssMetadataClusterDiscoverSpec !
dataprotection.v4.content.ClusterDiscoverOperation = GET_VSS_METADATA COMPUTE_CHANGED_REGIONS
dataprotection.v4.content.ComputeChangedRegionsClusterDiscoverSpec
  diskRecoveryPoint ~VolumeGroupDiskRecoveryPointReference|~VmDiskRecoveryPointReference !
  referenceDiskRecoveryPoint ~VolumeGroupDiskRecoveryPointReference|~VmDiskRecoveryPointReference
dataprotection.v4.content.GetVssMetadataClusterDiscoverSpec
  vmRecoveryPointExtId uuid !
dataprotection.v4.content.VmDiskRecoveryPointReference
  vmRecoveryPointExtId uuid !
  recoveryPointExtId uuid !
  diskRecoveryPointExtId uuid !
dataprotection.v4.content.VolumeGroupDiskRecoveryPointReference
  volumeGroupRecoveryPointExtId uuid
  recoveryPointExtId uuid
  diskRecoveryPointExtId uuid
dataprotection.v4.common.ClusterInfo
  jwtToken str
  clusterIp common.v1.config.IPAddress
dataprotection.v4.content.VmRecoveryPointChangedRegionsComputeSpec
  offset int 0..
  length int 1..
  blockSizeByte int 32768..262144
  referenceVmRecoveryPointExtId uuid
  referenceRecoveryPointExtId uuid
  referenceDiskRecoveryPointExtId uuid
dataprotection.v4.content.ChangedRegion
  offset int !
  length int !
  regionType ~RegionType !
dataprotection.v4.content.RegionType = ZEROED REGULAR
"""

VOLUMES: Final = r"""
volumes.v4.config.VolumeGroup +
  name str 1..256
  description str ..1000
  shouldLoadBalanceVmAttachments bool
  sharingStatus ~SharingStatus
  targetPrefix str ..512 /[\da-zA-Z:.\-]+/
  targetName str 12..190 /[\da-zA-Z:.\-]+/
  enabledAuthentications ~AuthenticationType
  iscsiFeatures ~IscsiFeatures
  createdBy str ..512
  clusterReference uuid
  storageFeatures any
  usageType ~UsageType
  attachmentType ~AttachmentType
  protocol ~Protocol
  isHidden bool
  disks [~VolumeDisk]
  attachments [any] @1
  hydrationStatus ~HydrationStatus @2
  projectExtId uuid @3
volumes.v4.config.VolumeDisk +
  index int 0..16383
  diskSizeBytes int 524288..219902325555200
  storageContainerId uuid
  description str ..1000
  diskDataSourceReference common.v1.config.EntityReference
  diskStorageFeatures any
volumes.v4.config.SharingStatus = SHARED NOT_SHARED
volumes.v4.config.UsageType = USER INTERNAL TEMPORARY BACKUP_TARGET
volumes.v4.config.AuthenticationType = CHAP NONE
volumes.v4.config.AttachmentType = NONE DIRECT EXTERNAL
volumes.v4.config.Protocol = NOT_ASSIGNED ISCSI NVMF
volumes.v4.config.HydrationStatus = IN_PROGRESS COMPLETE FAIL
volumes.v4.config.IscsiFeatures
  targetSecret str 12..16 /[!-~]+/
  enabledAuthentications ~AuthenticationType
volumes.v4.config.IscsiClient +
  iscsiInitiatorName str 1..64 /[\da-zA-Z:.\-]+/
  iscsiInitiatorNetworkId common.v1.config.IPAddressOrFQDN
  clientSecret str 12..16 /[!-~]+/
  enabledAuthentications ~AuthenticationType
  attachedTargets [~TargetParam]
  numVirtualTargets int 1..32
  clusterReference uuid
  attachmentSite ~VolumeGroupAttachmentSite
  projectExtId uuid @3
volumes.v4.config.VolumeGroupAttachmentSite = PRIMARY SECONDARY
volumes.v4.config.IscsiClientAttachment
  extId uuid !
  clusterReference uuid
volumes.v4.config.TargetParam
  numVirtualTargets int 1..32
  iscsiTargetName str ..512
volumes.v4.config.VmAttachment
  extId uuid !
  index int
volumes.v4.config.VolumeGroupMetadata
  ownerReference str
  categoryIds [str]
"""

PRISM: Final = r"""
prism.v4.config.Task
  extId task
  operation str
  operationDescription str
  parentTask any
  createdTime time
  startedTime time
  completedTime time
  status ~TaskStatus
  progressPercentage int 0..100
  entitiesAffected [~EntityReference]
  subTasks [any]
  subSteps [any]
  isCancelable bool
  ownedBy ~OwnerReference
  completionDetails [common.v1.config.KVPair]
  errorMessages [prism.v4.error.AppMessage]
  legacyErrorMessage str
  lastUpdatedTime time
  clusterExtIds [str]
  isBackgroundTask bool
  numberOfSubtasks int
  numberOfEntitiesAffected int
  appName str ..128 @1
prism.v4.config.TaskStatus = QUEUED RUNNING CANCELING SUCCEEDED FAILED CANCELED SUSPENDED
prism.v4.config.TaskReference
  extId task
prism.v4.config.EntityReference
  extId str
  rel str
  name str ..256
prism.v4.config.OwnerReference
  extId uuid
  name str ..256
prism.v4.error.AppMessage
  message str
  severity common.v1.config.MessageSeverity
  code str
  locale str
  errorGroup str
  argumentsMap map
prism.v4.config.Category +
  key str 1..64 /[^$/,!"#%'()*+:;=?\\|\[\]^&][^/,!"#%'()*+:;=?\\|\[\]^&]{0,63}/ !
  value str 1..64 /[^$/,!"#%'()*+:;=?\\|\[\]^&][^/,!"#%'()*+:;=?\\|\[\]^&]{0,63}/ !
  type ~CategoryType
  description str ..512
  ownerUuid uuid
prism.v4.config.CategoryType = USER SYSTEM INTERNAL
prism.v4.config.DomainManager +
  config ~DomainManagerClusterConfig
  network map
  hostingClusterExtId uuid
  isRegisteredWithHostingCluster bool
  shouldEnableHighAvailability bool
prism.v4.config.DomainManagerClusterConfig
  name str
  buildInfo clustermgmt.v4.config.BuildInfo
  size str
"""

CLUSTERMGMT: Final = r"""
clustermgmt.v4.config.Cluster +
  name str ..75
  nodes ~NodeReference
  config ~ClusterConfigReference
  network ~ClusterNetworkReference
  vmCount int
clustermgmt.v4.config.ClusterNetworkReference
  externalAddress common.v1.config.IPAddress
  externalDataServiceIp common.v1.config.IPAddress
  fqdn str
clustermgmt.v4.config.ClusterConfigReference
  buildInfo ~BuildReference
  hypervisorTypes [~HypervisorType]
  clusterFunction [~ClusterFunctionRef]
  timezone str
  redundancyFactor int
  clusterSoftwareMap [~SoftwareMapReference]
  operationMode ~OperationMode
  isLts bool
  isAvailable bool
clustermgmt.v4.config.OperationMode = NORMAL READ_ONLY STAND_ALONE SWITCH_TO_TWO_NODE OVERRIDE
clustermgmt.v4.config.ClusterFunctionRef = AOS PRISM_CENTRAL CLOUD_DATA_GATEWAY AFS ONE_NODE TWO_NODE ANALYTICS_PLATFORM
clustermgmt.v4.config.NodeReference
  numberOfNodes int
  nodeList [~NodeListItemReference]
clustermgmt.v4.config.NodeListItemReference
  controllerVmIp common.v1.config.IPAddress
  nodeUuid uuid
  hostIp common.v1.config.IPAddress
clustermgmt.v4.config.BuildReference
  buildType str
  version str
  fullVersion str
clustermgmt.v4.config.BuildInfo
  version str
clustermgmt.v4.config.SoftwareMapReference
  softwareType ~SoftwareTypeRef
  version str
clustermgmt.v4.config.SoftwareTypeRef = NOS NCC PRISM_CENTRAL
clustermgmt.v4.config.HypervisorType = AHV ESX HYPERV XEN NATIVEHOST
clustermgmt.v4.config.StorageContainer +
  containerExtId uuid
  ownerExtId uuid
  name str 1..75 !
  clusterExtId uuid
  storagePoolExtId uuid
  isMarkedForRemoval bool
  maxCapacityBytes int 0..
  logicalExplicitReservedCapacityBytes int
  logicalAdvertisedCapacityBytes int
  replicationFactor int
  isCompressionEnabled bool
  isInternal bool
  isEncrypted bool
  clusterName str ..256
  isShared bool @3
"""

NETWORKING: Final = r"""
networking.v4.config.Subnet +
  name str 1..128 !
  description str ..1000
  subnetType ~SubnetType !
  networkId int 0..16777215
  ipConfig [any]
  clusterReference uuid
  clusterReferenceList [uuid] @4
  clusterNameList [str] @4
  virtualSwitchReference uuid
  vpcReference uuid
  isNatEnabled bool
  isExternal bool
  bridgeName str ..128
  isAdvancedNetworking bool
  clusterName str ..128
  hypervisorType str
  metadata any
  isConnected bool @4
networking.v4.config.SubnetType = OVERLAY VLAN
"""

#: Models whose parts are of their own type where only a selection of fields is asked for.
PROJECTIONS: Final = frozenset(
    {
        "clustermgmt.v4.config.Cluster",
        "clustermgmt.v4.config.StorageContainer",
        "dataprotection.v4.config.RecoveryPoint",
        "iam.v4.authz.AuthorizationPolicy",
        "iam.v4.authz.Role",
        "networking.v4.config.Subnet",
        "prism.v4.config.Category",
        "volumes.v4.config.IscsiClient",
        "volumes.v4.config.IscsiClientAttachment",
        "volumes.v4.config.VmAttachment",
        "volumes.v4.config.VolumeDisk",
        "volumes.v4.config.VolumeGroup",
    }
)
