"""Token files as other programs write them."""

import json

from cat_fast.dual_token.sequence import Vocabulary
from cat_fast.dual_token.token_file import read_tokens

VOCABULARY = Vocabulary(semantic_length=0, semantic_size=0, guide_size=16)


def test_lines_end_at_line_feeds_alone_and_may_follow_a_byte_order_mark(tmp_path):
    names = ["a\u2028b", "c\x85d"]
    rows = [{"key": name, "guide": [[1, 2]]} for name in names]
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    path = tmp_path / "tokens.jsonl"
    path.write_bytes("\ufeff".encode() + "\r\n".join(lines).encode() + b"\n")
    found = read_tokens(path, VOCABULARY, None)
    assert [record.key for record in found] == names
    assert all(record.tokens.guide.tolist() == [[1, 2]] for record in found)
