# SPDX-License-Identifier: AGPL-3.0-or-later
"""PHCBT01: the delta format. Specified in docs/phcbt01.md."""

from replicator.phcbt.compose import compose
from replicator.phcbt.decode import (
    NEED_DATA,
    DataRecord,
    Decoder,
    End,
    Event,
    Header,
    IndexRecord,
    Limits,
    ZeroRecord,
)
from replicator.phcbt.encode import (
    StreamWriter,
    encode_chunk,
    encode_data,
    split_chunk,
    zero_record,
)
from replicator.phcbt.format import (
    Algorithm,
    EncodedRecord,
    GrainRun,
    IndexEntry,
    StreamHeader,
)
from replicator.phcbt.read import StoredDelta
from replicator.phcbt.resume import SkeletonCut, SkeletonReader, SkeletonRecord, resume_partial
from replicator.phcbt.track import Counts
from replicator.phcbt.verify import Finding, verify_file

__all__ = [
    "NEED_DATA",
    "Algorithm",
    "Counts",
    "DataRecord",
    "Decoder",
    "EncodedRecord",
    "End",
    "Event",
    "Finding",
    "GrainRun",
    "Header",
    "IndexEntry",
    "IndexRecord",
    "Limits",
    "SkeletonCut",
    "SkeletonReader",
    "SkeletonRecord",
    "StoredDelta",
    "StreamHeader",
    "StreamWriter",
    "ZeroRecord",
    "compose",
    "encode_chunk",
    "encode_data",
    "resume_partial",
    "split_chunk",
    "verify_file",
    "zero_record",
]
