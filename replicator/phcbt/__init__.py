# SPDX-License-Identifier: AGPL-3.0-or-later
"""PHCBT01: the delta format. Specified in docs/phcbt01.md."""

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
from replicator.phcbt.track import Counts

__all__ = [
    "NEED_DATA",
    "Algorithm",
    "Counts",
    "DataRecord",
    "Decoder",
    "EncodedRecord",
    "End",
    "Event",
    "GrainRun",
    "Header",
    "IndexEntry",
    "IndexRecord",
    "Limits",
    "StreamHeader",
    "StreamWriter",
    "ZeroRecord",
    "encode_chunk",
    "encode_data",
    "split_chunk",
    "zero_record",
]
