# SPDX-License-Identifier: AGPL-3.0-or-later
"""The models of namespace iam, as ``schema`` reads them."""

from __future__ import annotations

from typing import Final

IAM: Final = r"""
iam.v4.authn.User +
  username str 1..255 !
  userType ~UserType !
  idpId uuid
  displayName str 1..255
  firstName str 1..255
  lastName str 1..255
  emailId str ..255
  locale str
  region str
  password str
  isForceResetPasswordEnabled bool
  status ~UserStatusType
  createdTime time
  lastUpdatedTime time
  description str
iam.v4.authn.UserType = LOCAL SAML LDAP EXTERNAL SERVICE_ACCOUNT
iam.v4.authn.UserStatusType = ACTIVE INACTIVE
iam.v4.authn.Key +
  name str 1..255 /[^<>;'()&+%\/\\"`]*/ !
  description str ..1000
  keyType ~KeyKind !
  createdTime time
  expiryTime time
  status ~KeyStatus
  assignedTo str 3..255
  keyDetails ~ApiKeyDetails|~ObjectKeyDetails
iam.v4.authn.KeyKind = API_KEY OBJECT_KEY
iam.v4.authn.KeyStatus = VALID REVOKED EXPIRED
iam.v4.authn.ApiKeyDetails
  apiKey str
iam.v4.authn.ObjectKeyDetails
  accessKey str
iam.v4.authz.Role +
  description str ..1000
  operations [uuid]
  createdTime time
  lastUpdatedTime time
  isSystemDefined bool
  displayName str 1..255 !
  clientName str
iam.v4.authz.AuthorizationPolicy +
  identities [~IdentityFilter]
  createdTime time
  lastUpdatedTime time
  isSystemDefined bool
  authorizationPolicyType ~AuthorizationPolicyType
  displayName str 1..255 !
  description str
  clientName str
  entities [~EntityFilter]
  role uuid !
iam.v4.authz.AuthorizationPolicyType = USER_DEFINED SERVICE_DEFINED PREDEFINED_READ_ONLY PREDEFINED_UPDATE_IDENTITY_ONLY SERVICE_DEFINED_READ_ONLY
iam.v4.authz.IdentityFilter
  identityFilter map
iam.v4.authz.EntityFilter
  entityFilter map
iam.v4.authz.Operation +
  displayName str 1..255
  description str ..1000
  entityType str
  clientName str ..255
  createdTime time
  lastUpdatedTime time
  operationType ~OperationType
iam.v4.authz.OperationType = INTERNAL SYSTEM_DEFINED_ONLY EXTERNAL
"""  # noqa: E501 - a line is an enum
