# SPDX-License-Identifier: AGPL-3.0-or-later
"""Sealed segments: one file that holds a contiguous range of a log's records for ever, verifiable by itself.

A segment carries the tree's frontier before its first record, so that its records alone give the root after its last
one, and the signed checkpoint of that root as a text that it does not understand: whoever gets a segment from elsewhere
verifies the checkpoint, `Segment.verify` does the rest. Its parts: segment_format.py lays it out, segment_records.py takes
records apart, segment_reader.py and segment_writer.py touch files, json_lines.py exports to an open format. None knows of
the log that the records came from, nor of what they mean. Everything blocks.
"""

from eventstore.json_lines import export_json_lines, read_json_lines
from eventstore.segment_reader import Segment, SegmentInfo
from eventstore.segment_records import CanonicalParts, SegmentError, split_canonical
from eventstore.segment_writer import write_segment

__all__ = [
    "CanonicalParts",
    "Segment",
    "SegmentError",
    "SegmentInfo",
    "export_json_lines",
    "read_json_lines",
    "split_canonical",
    "write_segment",
]
