"""Check the English of comments, docstrings, messages and documents: words to avoid, and their rates.

    python scripts/check_language.py [PATH ...]

Prints one `file:line: problem` per banned word, then the rates per 10,000 words; exits with 1 on a problem.
Code in backticks and fenced blocks is left out, and so are strings without a space, which are names.
"""

import argparse
import ast
import io
import re
import sys
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SCOPE = (
    "cat_fast", "kernels", "csrc", "configs", "benchmarks", "scripts", "docs", "README.md", "CONTRIBUTING.md",
    "CHANGELOG.md",
)  # fmt: skip

BANNED = {
    "told, tell": r"told|tell(?:s|ing)?",
    "anew": r"anew",
    "begun": r"begun",
    "nobody, whoever": r"nobody|whoever",
    "dearest": r"dear(?:est|er)?",
    "goes on": r"(?:go|goes|going|gone|went) on",
}
"""Patterns that no text may contain."""

OPENINGS = ("What", "Whether", "Which", "Of", "As", "That")
"""First words that no docstring may have."""

_COUNTED = (
    r"(?:(?!this|has|was|does|needs|reads|makes|gives)[a-z]{3,}s|once|twice|one|two|three|four|eight|\d+|ms|px|"
    r"[KMG]i?B|cost|memory|share|dataclass|number|score|row|column|file|folder|process|seed)"
)
_UNIT = (
    r"(?:image|step|rank|line|second|minute|hour|day|token|pixel|shard|batch|epoch|process|worker|thread|block|"
    r"program|channel|group|head|sequence|ratio|node|machine|sample|file|section|row|class|caption|GPU|call|side|"
    r"multiprocessor|pass|crop|tile|launch|warp|position|word|page|photo|photograph)"
)
RATES = {
    "say(s)": (r"says?", 3),
    "beside(s)": (r"besides?", 2),
    "is/are no X": (r"(?:is|are|was|were) no (?!longer\b|more than\b)\w+", 4),
    "picture": (r"pictures?", 8),
    "what is/it/the/a": (r"what (?:is|it|the|an?)", 8),
    "a step, for per": (rf"{_COUNTED} an? {_UNIT}", 8),
    "lie(s)": (r"lies?", 2),
    "how many": (r"how many", 2),
}
"""Patterns, and how often each may occur in 10,000 words."""

EXCEPTIONS = {("scripts/check_language.py", "goes on"): "the name of its own rule"}
"""(file, matched text) -> why it stands there."""


@dataclass(frozen=True)
class Text:
    """A piece of prose and where it starts."""

    path: Path
    line: int
    content: str
    docstring: bool = False


@dataclass(frozen=True)
class Match:
    path: Path
    line: int
    rule: str
    found: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.rule}: {self.found!r}"


def texts_of(root: Path, paths: list[str]) -> Iterator[Text]:
    """Yield the prose of all files below some paths, given relative to `root`."""
    for name in paths:
        top = root / name
        for path in sorted(top.rglob("*")) if top.is_dir() else [top]:
            if path.is_file() and (read := _READERS.get(path.suffix)) and "__pycache__" not in path.parts:
                for line, content, docstring in read(path.read_text()):
                    yield Text(path.relative_to(root), line, _without_code(content), docstring)


def find_banned(texts: list[Text]) -> list[Match]:
    """Return the words and docstring openings that no text may contain."""
    found = [
        match for text in texts for rule, pattern in BANNED.items() for match in _matches(text, rule, pattern)
    ]
    for text in texts:
        opening = re.match(r"\s*([A-Za-z]+)", text.content)
        if text.docstring and opening and opening[1] in OPENINGS:
            found.append(Match(text.path, text.line, "docstring opening", opening[1]))
    return [match for match in found if (str(match.path), match.found.lower()) not in EXCEPTIONS]


def find_rated(texts: list[Text]) -> dict[str, list[Match]]:
    """Return the matches of each rule that has a rate."""
    return {
        rule: [match for text in texts for match in _matches(text, rule, pattern)]
        for rule, (pattern, _) in RATES.items()
    }


def count_words(texts: list[Text]) -> int:
    return sum(len(re.findall(r"[A-Za-z][A-Za-z']*", text.content)) for text in texts)


def _matches(text: Text, rule: str, pattern: str) -> Iterator[Match]:
    spaced = pattern.replace(" ", r"[\s#/*]+")
    for match in re.finditer(rf"\b(?:{spaced})\b", text.content, re.IGNORECASE):
        line = text.line + text.content.count("\n", 0, match.start())
        yield Match(text.path, line, rule, re.sub(r"[\s#/*]+", " ", match[0]))


def _without_code(content: str) -> str:
    return re.sub(r"`[^`]*`", lambda code: "`" + "\n" * code[0].count("\n") + "`", content)


_Reading = Iterator[tuple[int, str, bool]]


def _read_python(source: str) -> _Reading:
    yield from _grouped(
        (token.start[0], token.string)
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT and not re.match(r"# (fmt|type|noqa|ruff|pragma)\b", token.string)
    )
    tree = ast.parse(source)
    parts = {
        id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in ast.walk(node)
    }
    documented = {id(doc) for node in ast.walk(tree) if (doc := _docstring(node)) is not None}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            # Values stand for a word each, so that the words around them stay apart.
            values = (v.value if isinstance(v, ast.Constant) else "{}" for v in node.values)
            content = "".join(map(str, values))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in parts:
            content = node.value
        else:
            continue
        if re.search(r"[A-Za-z] +[A-Za-z]", content) or id(node) in documented:
            yield node.lineno, content, id(node) in documented


def _docstring(node: ast.AST) -> ast.expr | None:
    if (
        not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        or not node.body
    ):
        return None
    first = node.body[0]
    is_text = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
    return first.value if is_text and isinstance(first.value.value, str) else None  # type: ignore[union-attr]


def _read_cpp(source: str) -> _Reading:
    comment = r"//[^\n]*|/\*.*?\*/"
    string = r'"(?:[^"\\\n]|\\.)*"'
    comments = []
    for match in re.finditer(rf"(?P<comment>{comment})|(?P<string>{string})", source, re.DOTALL):
        line = source.count("\n", 0, match.start()) + 1
        if match["comment"]:
            comments.append((line, match[0]))
        elif " " in match[0]:
            yield line, match[0], False
    yield from _grouped(comments)


def _read_hash_comments(source: str) -> _Reading:
    lines = enumerate(source.splitlines(), 1)
    yield from _grouped((n, match[0]) for n, line in lines if (match := re.search(r"(?:^|\s)#.*", line)))


def _read_shell(source: str) -> _Reading:
    yield from _read_hash_comments(source)
    for n, line in enumerate(source.splitlines(), 1):
        for match in re.finditer(r"\"[^\"]* [^\"]*\"|'[^']* [^']*'", re.sub(r"(?:^|\s)#.*", "", line)):
            yield n, match[0], False


def _read_markdown(source: str) -> _Reading:
    fenced = re.sub(r"^```.*?^```", lambda block: "\n" * block[0].count("\n"), source, flags=re.M | re.S)
    linked = re.sub(r"\]\([^)\s]*\)", "]", fenced)
    for match in re.finditer(r"(?:[^\n]+\n?)+", linked):
        yield linked.count("\n", 0, match.start()) + 1, match[0], False


def _read_html(source: str) -> _Reading:
    visible = re.sub(
        r"<(script|style)\b.*?</\1>|<[^>]*>", lambda tag: "\n" * tag[0].count("\n"), source, flags=re.S
    )
    yield from _read_markdown(visible)


def _grouped(lines: Iterator[tuple[int, str]] | list[tuple[int, str]]) -> _Reading:
    """Join comments on successive lines, across which phrases may run."""
    first, end, content = 0, -1, ""
    for line, text in lines:
        if line == end + 1:
            content += "\n" + text
        else:
            if content:
                yield first, content, False
            first, content = line, text
        end = line + text.count("\n")
    if content:
        yield first, content, False


_READERS = {
    **dict.fromkeys((".py",), _read_python),
    **dict.fromkeys((".cpp", ".cu", ".h", ".cuh"), _read_cpp),
    **dict.fromkeys((".yaml", ".yml", ".toml"), _read_hash_comments),
    **dict.fromkeys((".sh", ".sbatch"), _read_shell),
    ".md": _read_markdown,
    ".html": _read_html,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "paths", nargs="*", default=SCOPE, help="files and folders (default: all of the project)"
    )
    parser.add_argument("--root", type=Path, default=ROOT, help="checkout to read")
    parser.add_argument("--show", action="store_true", help="list the matches of rated patterns, too")
    options = parser.parse_args()
    texts = list(texts_of(options.root, list(options.paths)))
    words = max(1, count_words(texts))
    banned, rated = find_banned(texts), find_rated(texts)
    for match in banned:
        print(match)
    failed = bool(banned)
    if options.show:
        print(*(match for matches in rated.values() for match in matches), sep="\n")
    print(f"{words} words, {len(banned)} banned")
    for rule, matches in rated.items():
        rate, limit = 1e4 * len(matches) / words, RATES[rule][1]
        failed |= rate > limit
        mark = " <- above" if rate > limit else ""
        print(f"{rule:18} {len(matches):5} {rate:6.1f} per 10,000 words, limit {limit}{mark}")
    sys.exit(failed)


if __name__ == "__main__":
    main()
