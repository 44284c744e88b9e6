# SPDX-License-Identifier: AGPL-3.0-or-later
"""The models of namespace vmm, as ``schema`` reads them."""

from __future__ import annotations

from typing import Final

VMS: Final = r"""
vmm.v4.ahv.config.Vm +
  name str ..80
  description str
  createTime time
  updateTime time
  source ~VmSourceReference
  numSockets int 1..
  numCoresPerSocket int 1..
  numThreadsPerCore int 1..
  numNumaNodes int
  memorySizeBytes int 1..
  isVcpuHardPinningEnabled bool
  isCpuPassthroughEnabled bool
  enabledCpuFeatures [any]
  isMemoryOvercommitEnabled bool
  isGpuConsoleEnabled bool
  isCpuHotplugEnabled bool
  isScsiControllerEnabled bool
  generationUuid uuid
  biosUuid uuid
  categories [~CategoryReference]
  project ~ProjectReference @1
  projectExtId uuid @3
  ownershipInfo ~OwnershipInfo
  host ~HostReference
  cluster ~ClusterReference
  availabilityZone any
  guestCustomization any
  guestTools ~GuestTools
  hardwareClockTimezone str ..64
  isBrandingEnabled bool
  bootConfig ~LegacyBoot|~UefiBoot
  isVgaConsoleEnabled bool
  machineType ~MachineType
  powerState ~PowerState
  vtpmConfig ~VtpmConfig
  isAgentVm bool
  apcConfig any
  isLiveMigrateCapable bool
  isCrossClusterMigrationInProgress bool
  storageConfig any
  disks [~Disk]
  cdRoms [~CdRom]
  nics [~Nic]
  gpus [any]
  serialPorts [any]
  protectionType ~ProtectionType
  protectionPolicyState any
  pcieDevices [any]
  customAttributes [str] @2
  vmGuestCustomizationStatus any @2
  sourceVmProfile any @3
  nextScheduledReboot any @3
vmm.v4.ahv.config.Disk +
  diskAddress ~DiskAddress
  backingInfo ~VmDisk|~ADSFVolumeGroupReference
  customAttributes [str] @2
vmm.v4.ahv.config.VmDisk
  diskExtId uuid
  diskSizeBytes int 1..
  storageContainer ~VmDiskContainerReference
  storageConfig any
  dataSource ~DataSource
  isMigrationInProgress bool
  vmDiskHydrationInfo any @2
  serialId str @3
  externalStorageInfo any @3
vmm.v4.ahv.config.DiskAddress
  busType ~DiskBusType
  index int 0..
vmm.v4.ahv.config.DiskBusType = SCSI IDE PCI SATA SPAPR
vmm.v4.ahv.config.VmDiskContainerReference
  extId uuid
vmm.v4.ahv.config.DataSource
  reference ~VmDiskReference|~VmDiskRecoveryPointReference|~ImageReference|~VolumeDiskReference !
vmm.v4.ahv.config.ImageReference
  imageExtId uuid !
  storageCluster ~ClusterReference @2
vmm.v4.ahv.config.VmDiskReference
  diskExtId uuid
  diskAddress ~DiskAddress
  vmReference ~VmReference
vmm.v4.ahv.config.VmReference
  extId uuid
vmm.v4.ahv.config.VmDiskRecoveryPointReference @1
  diskRecoveryPointExtId uuid
  vmRecoveryPointExtId uuid
vmm.v4.ahv.config.VolumeDiskReference @1
  diskExtId uuid
  volumeGroupExtId uuid
vmm.v4.ahv.config.ADSFVolumeGroupReference
  volumeGroupExtId uuid !
vmm.v4.ahv.config.CdRom +
  diskAddress ~CdRomAddress
  backingInfo ~VmDisk
  isoType ~IsoType
vmm.v4.ahv.config.CdRomAddress
  busType ~CdRomBusType
  index int 0..
vmm.v4.ahv.config.CdRomBusType = IDE SATA
vmm.v4.ahv.config.CdRomInsertParams
  backingInfo ~VmDisk
  isoType ~IsoType
vmm.v4.ahv.config.IsoType = OTHER GUEST_TOOLS GUEST_CUSTOMIZATION
vmm.v4.ahv.config.Nic +
  backingInfo ~EmulatedNic
  nicBackingInfo ~VirtualEthernetNic @1
  networkInfo ~NicNetworkInfo
  nicNetworkInfo ~VirtualEthernetNicNetworkInfo @1
vmm.v4.ahv.config.EmulatedNic
  model ~EmulatedNicModel
  macAddress mac
  isConnected bool
  numQueues int 1..
vmm.v4.ahv.config.EmulatedNicModel = VIRTIO E1000
vmm.v4.ahv.config.NicNetworkInfo
  nicType ~NicType
  networkFunctionChain any
  networkFunctionNicType str
  subnet ~SubnetReference
  vlanMode ~VlanMode
  trunkedVlans [int]
  shouldAllowUnknownMacs bool
  ipv4Config ~Ipv4Config
  ipv4Info ~Ipv4Info
vmm.v4.ahv.config.NicType = NORMAL_NIC DIRECT_NIC NETWORK_FUNCTION_NIC SPAN_DESTINATION_NIC
vmm.v4.ahv.config.VlanMode = ACCESS TRUNK
vmm.v4.ahv.config.VirtualEthernetNic @1
  model ~VirtualEthernetNicModel
  macAddress mac
  isConnected bool
  numQueues int 1..
vmm.v4.ahv.config.VirtualEthernetNicModel = VIRTIO E1000
vmm.v4.ahv.config.VirtualEthernetNicNetworkInfo @1
  nicType ~NicType
  networkFunctionChain any
  networkFunctionNicType str
  subnet ~SubnetReference
  vlanMode ~VlanMode
  trunkedVlans [int]
  shouldAllowUnknownMacs bool
  ipv4Config ~Ipv4Config
  ipv4Info ~Ipv4Info
  ipv6Info any
vmm.v4.ahv.config.SubnetReference
  extId uuid
vmm.v4.ahv.config.Ipv4Config
  shouldAssignIp bool
  ipAddress common.v1.config.IPv4Address
  secondaryIpAddressList [common.v1.config.IPv4Address]
vmm.v4.ahv.config.Ipv4Info
  learnedIpAddresses [common.v1.config.IPv4Address]
vmm.v4.ahv.config.LegacyBoot
  bootDevice ~BootDeviceDisk|~BootDeviceNic
  bootOrder [~BootDeviceType]
vmm.v4.ahv.config.UefiBoot
  isSecureBootEnabled bool
  nvramDevice any
  bootDevice ~BootDeviceDisk|~BootDeviceNic
  bootOrder [~BootDeviceType]
vmm.v4.ahv.config.BootDeviceDisk
  diskAddress ~DiskAddress
vmm.v4.ahv.config.BootDeviceNic
  macAddress mac
vmm.v4.ahv.config.BootDeviceType = CDROM DISK NETWORK
vmm.v4.ahv.config.VtpmConfig
  isVtpmEnabled bool
  version str
  vtpmDevice any @1
vmm.v4.ahv.config.MachineType = PC PSERIES Q35
vmm.v4.ahv.config.PowerState = ON OFF PAUSED UNDETERMINED
vmm.v4.ahv.config.ProtectionType = UNPROTECTED PD_PROTECTED RULE_PROTECTED
vmm.v4.ahv.config.GuestTools
  version str
  isInstalled bool
  isEnabled bool
  isIsoInserted bool
  capabilities [~NgtCapability]
  availableVersion str
  guestOsVersion str
  isReachable bool
  isVssSnapshotCapable bool
  isVmMobilityDriversInstalled bool
  isCommunicationActiveOverSerialPort bool @1
  guestInfo any @2
vmm.v4.ahv.config.NgtCapability = SELF_SERVICE_RESTORE VSS_SNAPSHOT
vmm.v4.ahv.config.VmSourceReference
  entityType ~VmSourceReferenceEntityType
  extId uuid
vmm.v4.ahv.config.VmSourceReferenceEntityType = VM VM_RECOVERY_POINT
vmm.v4.ahv.config.ClusterReference
  extId uuid
vmm.v4.ahv.config.HostReference
  extId uuid
vmm.v4.ahv.config.CategoryReference
  extId uuid
vmm.v4.ahv.config.OwnershipInfo
  owner ~OwnerReference
vmm.v4.ahv.config.OwnerReference
  extId uuid
vmm.v4.ahv.config.ProjectReference @1
  extId uuid
vmm.v4.ahv.config.CloneOverrideParams
  name str ..80
  numSockets int 1..
  numCoresPerSocket int 1..
  numThreadsPerCore int 1..
  memorySizeBytes int 1..
  nics [~Nic]
  bootConfig ~LegacyBoot|~UefiBoot
  guestCustomization any
  guestCustomizationProfileConfig any @2
  bulkCloneOptions any @3
vmm.v4.ahv.config.GuestPowerOptions
  guestPowerStateTransitionConfig ~GuestPowerStateTransitionConfig
vmm.v4.ahv.config.GuestPowerStateTransitionConfig
  shouldEnableScriptExec bool
  shouldFailOnScriptFailure bool
vmm.v4.ahv.config.AssociateVmCategoriesParams
  categories [~CategoryReference] !
vmm.v4.ahv.config.DisassociateVmCategoriesParams
  categories [~CategoryReference] !
"""

RECOVERY_POINTS: Final = r"""
vmm.v4.ahv.config.VmRecoveryPoint +
  vm ~Vm
  consistencyGroupExtId str @1
  diskRecoveryPoints [dataprotection.v4.common.DiskRecoveryPoint] @1
  vmExtId uuid @1
  vmCategories [str] @1
  applicationConsistentProperties dataprotection.v4.common.VssProperties @1
  locationAgnosticId str
  projectExtId str @3
  name str ..256
  creationTime time
  expirationTime time
  status dataprotection.v4.common.RecoveryPointStatus
  recoveryPointType dataprotection.v4.common.RecoveryPointType
  totalExclusiveUsageBytes int @2
  sourceLocation any @3
vmm.v4.ahv.config.RestoreVmRecoveryPointParams @1
  isStrictMode bool
  vmConfigOverrideSpec ~VmConfigOverrideSpecification
vmm.v4.ahv.config.VmConfigOverrideSpecification @1
  name str ..80
  description str
  nicSpec ~VmRestoreNicConfigSpecification
  categories [~CategoryReference]
  projectExtId uuid @3
  ownershipInfo ~OwnershipInfo
  guestToolsSpec any @2
  biosSpec any @3
vmm.v4.ahv.config.VmRestoreNicConfigSpecification @1
  nicRemoveList [uuid]
  nicOverrideList [~VmRestoreNicConfigOverrideParams]
vmm.v4.ahv.config.VmRestoreNicConfigOverrideParams @1
  nicExtId uuid !
  nicBackingInfo ~VmRestoreVirtualEthernetNicOverrideSpec
  nicNetworkInfo ~VmRestoreVirtualEthernetNicNetworkInfoOverrideSpec
  guestNicInfo any @2
vmm.v4.ahv.config.VmRestoreVirtualEthernetNicOverrideSpec @1
  macAddress mac
vmm.v4.ahv.config.VmRestoreVirtualEthernetNicNetworkInfoOverrideSpec @1
  subnet ~SubnetReference
  ipv4Config any
"""

IMAGES: Final = r"""
vmm.v4.content.Image +
  name str 1..256 !
  description str ..1000
  type ~ImageType !
  checksum ~ImageSha1Checksum|~ImageSha256Checksum
  sizeBytes int
  source ~VmDiskSource|~ObjectsLiteSource|~UrlSource
  categoryExtIds [uuid]
  clusterLocationExtIds [uuid]
  contentRepositoryExtId uuid @3
  contentRepositoryName str 1..256 @3
  createTime time
  lastUpdateTime time
  ownerExtId uuid
  ownerName str @2
  placementPolicyStatus [any]
  projectExtId uuid @3
  isSharedWithAllProjects bool @3
vmm.v4.content.ImageType = DISK_IMAGE ISO_IMAGE
vmm.v4.content.UrlSource
  url str /(https?|nfs)://\S+/ !
  shouldAllowInsecureUrl bool
  basicAuth ~UrlBasicAuth
vmm.v4.content.UrlBasicAuth
  username str 1..1000 !
  password str !
vmm.v4.content.VmDiskSource
  extId uuid !
  vmExtId uuid @3
vmm.v4.content.ObjectsLiteSource
  key str 1..1024 !
vmm.v4.content.ImageSha1Checksum
  hexDigest str /[a-fA-F0-9]{40}/ !
vmm.v4.content.ImageSha256Checksum
  hexDigest str /[a-fA-F0-9]{64}/ !
"""
