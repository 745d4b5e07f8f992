"""How the house is built, counted from its sources: names, shape letters, parameters, docstrings, comments.

    python -m tests.support.house            # every rule that is broken, by file, and the counts

`tests/repo/test_house.py` holds these rules, `tests/repo/test_imports.py` those of who imports whom. Everything is
read with `ast` and `tokenize`; nothing is imported.
"""

from __future__ import annotations

import ast
import io
import re
import sys
import tokenize
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("selfforcing_core", "nodes", "train")
PRODUCT = (*PACKAGES, "bench", "workflows")
MAX_POSITIONAL, MAX_PARAMETERS = 8, 12
COMMENTS_GOAL = 65  # a thousand lines; well-kept model code elsewhere has 70 to 170

# What a shape letter means, wherever it stands, as docs/map.md says. A legend may go on after these words: H W height
# and width in pixels.
ALPHABET = {
    "B": ("batch",),
    "T": ("latent frames",),
    "C": ("latent channels", "channels"),  # features inside an autoencoder have channels too
    "H": ("latent size", "height and width"),
    "W": ("latent size", "height and width"),
    "L": ("query tokens",),
    "S": ("cached tokens",),
    "Q": ("tokens of one frame",),
    "N": ("heads",),
    "K": ("head width",),
    "D": ("model width",),
    "P": ("text tokens",),
    "E": ("text width",),
    "I": ("image tokens",),
    "Y": ("image-feature width",),
    "G": ("B times T",),
    "V": ("video frames",),
    "R": ("RGB",),
}
# Identifiers that look like a shape and are none.
NO_SHAPES = {
    "do_GET": "http.server calls it",
    "do_POST": "http.server calls it",
}

# File names that two rooms of the product share, each with the reason.
SHARED_FILE_NAMES = {
    "plan.py": "the command `python -m train.plan` keeps its name, and a plan is what `generate` makes of a request",
}

# Definitions that no product code names, because somebody else calls them.
CALLED_FROM_OUTSIDE = {
    "comfy_entrypoint": "ComfyUI calls it",
    "WEB_DIRECTORY": "ComfyUI reads it",
    "get_node_list": "ComfyUI calls it",
    "on_load": "ComfyUI calls it",
    "define_schema": "ComfyUI calls it",
    "execute": "ComfyUI calls it",
    "fingerprint_inputs": "ComfyUI calls it",
    "validate_inputs": "ComfyUI calls it",
    "check_lazy_status": "ComfyUI calls it",
    "decode_tiled": "ComfyUI calls it on every VAE",
    "encode_tiled": "ComfyUI calls it on every VAE",
    "spacial_compression_decode": "ComfyUI calls it on every VAE",
    "spacial_compression_encode": "ComfyUI calls it on every VAE",
    "temporal_compression_decode": "ComfyUI calls it on every VAE",
    "get_sd": "ComfyUI calls it on every VAE",
    "forward": "torch calls it",
    "backward": "torch calls it",
    "extra_repr": "torch calls it",
    "__main__": "python -m",
}

# Verbs with which a docstring may begin.
VERBS = """
Abort Accept Accumulate Acknowledge Add Adjust Advance Align Allocate Allow Answer Append Apply Arrange Ask
Assemble Assert Assign Attach Attend Average Await Backpropagate Batch Begin Bind Blend Blur Borrow Branch
Bring Broadcast Build Bundle Cache Calculate Calibrate Call Cancel Cast Catch Change Check Choose Chunk Clamp
Classify Clean Clear Clip Clone Close Collect Combine Compare Compile Complete Compose Compress Compute
Concatenate Condition Configure Connect Consume Continue Convert Copy Correct Count Cover Create Crop Cut Deal
Decide Declare Decode Decompress Define Delay Delete Deliver Denoise Dequantise Derive Describe Detach Detect
Determine Discard Dispatch Display Divide Do Download Downscale Drain Draw Drop Dump Embed Empty Enable Encode
End Ensure Enter Enumerate Erase Estimate Evaluate Evict Exclude Execute Exit Expand Explain Export Extend
Extract Fail Fall Fetch Fill Filter Find Finish Fit Flatten Flip Flush Fold Follow Forget Format Forward Free
Freeze Gather Generate Get Give Go Greet Group Grow Guard Guess Guide Halt Hand Handle Hash Hide Hold Identify
Ignore Import Include Increase Infer Initialise Inject Insert Inspect Install Integrate Interleave Interpolate
Interrupt Invert Iterate Join Judge Keep Label Lay Lead Learn Leave Lend Let Lift Limit Link List Listen Load
Locate Lock Log Look Make Map Mark Mask Match Mean Measure Mend Merge Migrate Mirror Mix Modulate Move
Multiply Name Narrow Normalise Note Notify Number Observe Offer Offload Omit Open Order Overwrite Pack Pad
Paint Parse Partition Pass Patch Pause Permute Persist Pick Place Plan Play Point Pool Pop Post Predict Prefer
Prefill Prepare Prepend Preserve Press Print Probe Process Produce Project Promise Propose Prune Publish Pull
Push Put Quantise Query Queue Quote Raise Range Rank Read Rebuild Recalculate Receive Recognise Record Reduce
Refer Refuse Register Regress Reject Release Reload Rely Remember Remove Rename Render Renoise Repair Repeat
Replace Replay Report Request Require Rescale Reserve Reset Reshape Resize Resolve Respond Restore Resume
Retry Return Reuse Reverse Rewind Rotate Round Route Run Sample Save Say Scale Scan Schedule Score Seal Search
See Seed Select Send Separate Set Shard Share Shift Shorten Show Shrink Shuffle Shut Sign Simulate Size Skip
Sleep Slice Smooth Snapshot Solve Sort Split Spread Stack Stage Start State Stay Steer Step Stop Store Stream
Stretch Strip Subtract Suggest Sum Summarise Supply Support Swap Switch Synchronise Take Tally Teach Tell Test
Tie Tile Time Tokenise Touch Trace Track Train Transform Translate Transpose Treat Trim Try Turn Undo Unfreeze
Unload Unlock Unpack Unpatchify Unstack Untie Update Upload Upscale Use Validate Verify View Wait Wake Walk
Warm Warn Warp Watch Weigh Widen Withdraw Work Wrap Write Yield Zero Zoom
"""


@dataclass(frozen=True)
class Violation:
    """One broken rule at one place."""

    rule: str
    path: str  # from the root, with forward slashes
    line: int
    text: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.rule}: {self.text}"


@dataclass(frozen=True)
class Source:
    """One Python file."""

    path: str  # from the root, with forward slashes
    text: str = field(repr=False)

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text)

    @cached_property
    def nodes(self) -> list[ast.AST]:
        return list(ast.walk(self.tree))

    @cached_property
    def tokens(self) -> list[tokenize.TokenInfo]:
        return list(tokenize.generate_tokens(io.StringIO(self.text).readline))

    @property
    def room(self) -> str:
        return self.path.split("/")[0] if "/" in self.path else ""

    @property
    def file_name(self) -> str:
        return self.path.rsplit("/", 1)[-1]


def read_sources(root: Path, rooms: tuple[str, ...] = PRODUCT) -> list[Source]:
    """Return every Python file of `rooms`, and of the root itself."""
    files = [*root.glob("*.py"), *(file for room in rooms for file in sorted((root / room).rglob("*.py")))]
    return [Source(file.relative_to(root).as_posix(), file.read_text(encoding="utf-8")) for file in files]


# Names.


def double_classes(sources: list[Source]) -> Iterator[Violation]:
    """Yield each class whose name another class of its package has."""
    first: dict[tuple[str, str], str] = {}
    for source in sources:
        for node in source.tree.body:
            if isinstance(node, ast.ClassDef):
                key = (source.room, node.name)
                if key in first:
                    yield Violation("class name", source.path, node.lineno, f"{node.name} is also in {first[key]}")
                first.setdefault(key, f"{source.path}:{node.lineno}")


def double_file_names(sources: list[Source]) -> Iterator[Violation]:
    """Yield each module with the file name of another, but for bench, `train/tiny` and what is listed."""
    paths: dict[str, list[str]] = defaultdict(list)
    for source in sources:
        is_compared = source.room in PACKAGES and not source.path.startswith("train/tiny/")
        if is_compared and source.file_name not in ("__init__.py", "__main__.py", "main.py"):
            paths[source.file_name].append(source.path)
    for name, same in paths.items():
        if len(same) > 1 and name not in SHARED_FILE_NAMES:
            yield from (Violation("file name", path, 1, f"also {', '.join(set(same) - {path})}") for path in same)
    for name in SHARED_FILE_NAMES:
        if len(paths[name]) < 2:
            yield Violation("file name", name, 1, "is listed as shared and is not")


# Functions.


def functions(source: Source) -> Iterator[tuple[ast.FunctionDef | ast.AsyncFunctionDef, ast.ClassDef | None]]:
    """Yield every function and the class that it is a method of."""
    owners = {
        child: node
        for node in source.nodes
        if isinstance(node, ast.ClassDef)
        for child in node.body
        if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef))
    }
    for node in source.nodes:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield node, owners.get(node)


def parameter_counts(function: ast.FunctionDef | ast.AsyncFunctionDef) -> tuple[int, int]:
    """Return how many parameters can be given by position, and how many there are; self and cls are none."""
    positional = [*function.args.posonlyargs, *function.args.args]
    named = [argument for argument in positional if argument.arg not in ("self", "cls")]
    return len(named), len(named) + len(function.args.kwonlyargs)


def long_parameter_lists(sources: list[Source]) -> Iterator[Violation]:
    """Yield each function with too many parameters. ComfyUI dictates those of a node's `execute`."""
    for source in sources:
        for function, owner in functions(source):
            is_node = owner is not None and any(ast.unparse(base).endswith("ComfyNode") for base in owner.bases)
            if is_node and function.name in ("execute", "fingerprint_inputs", "validate_inputs"):
                continue
            positional, count = parameter_counts(function)
            if positional > MAX_POSITIONAL or count > MAX_PARAMETERS:
                text = f"{function.name} takes {count} parameters, {positional} of them by position"
                yield Violation("parameters", source.path, function.lineno, text)


def is_property(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    words = [ast.unparse(decorator).split(".")[-1] for decorator in function.decorator_list]
    return any(word in ("property", "cached_property") for word in words)


def verbless_docstrings(sources: list[Source]) -> Iterator[Violation]:
    """Yield each docstring of a public function that does not begin with a verb. Properties may be nouns."""
    for source in sources:
        for function, _ in functions(source):
            if function.name.startswith("_") or is_property(function):
                continue
            docstring = ast.get_docstring(function)
            if docstring is not None and docstring.split()[0].rstrip(":,.") not in VERBS.split():
                text = f"the docstring of {function.name} begins with {docstring.split()[0]!r}"
                yield Violation("docstring", source.path, function.lineno, text)


# Shape letters.

PROSE_SHAPE = re.compile(r"\[([A-Z0-9][A-Z0-9+*/ ]*(?:, ?[A-Z0-9][A-Z0-9+*/ ]*)+)\]")  # [B, T, C, H, W] in prose
ENTRY = re.compile(r"((?:[A-Z] )*[A-Z])(?: =)? (.+)")


def legend(source: Source) -> tuple[int, dict[str, str]]:
    """Return the line of the module's legend (0: none) and what it says of each letter.

    Letters: B batch, H W latent size, G = B times T.
    """
    match = re.search(r"\bLetters: (.*?)\.(?=\s|$)", ast.get_docstring(source.tree, clean=False) or "", re.DOTALL)
    if match is None:
        return 0, {}
    line = next(number for number, text in enumerate(source.text.splitlines(), 1) if "Letters: " in text)
    meanings: dict[str, str] = {}
    for entry in re.split(r",\s+(?=[A-Z]\b)", " ".join(match[1].split())):
        parts = ENTRY.fullmatch(entry)
        if parts is None:
            meanings[entry] = ""
        else:
            meanings.update(dict.fromkeys(parts[1].split(), parts[2]))
    return line, meanings


def shape_suffix(name: str) -> str:
    """Return the shape at the end of an identifier (latents_BTCHW: BTCHW, x_1PE: 1PE), or nothing.

    Constants, all in capitals, have none. What follows the last underscore is a shape if it has a capital and no small
    letter; digits are sizes.
    """
    if name.isupper() or name in NO_SHAPES:
        return ""
    match = re.search(r"[a-z0-9]_([A-Z0-9]*[A-Z][A-Z0-9]*)$", name)
    return match[1] if match else ""


def shape_letters(source: Source) -> dict[str, tuple[int, str]]:
    """Map each letter in the shape suffixes of the file to the first line and identifier that has it."""
    letters: dict[str, tuple[int, str]] = {}
    for token in source.tokens:
        if token.type == tokenize.NAME:
            for letter in filter(str.isalpha, shape_suffix(token.string)):
                letters.setdefault(letter, (token.start[0], token.string))
    return letters


def prose_letters(source: Source) -> set[str]:
    """Return the letters of shapes that docstrings and comments write out: [B, T, C, H, W]."""
    words = [token.string for token in source.tokens if token.type in (tokenize.COMMENT, tokenize.STRING)]
    return {letter for word in words for shape in PROSE_SHAPE.findall(word) for letter in shape if letter.isalpha()}


def wrong_letters(sources: list[Source]) -> Iterator[Violation]:
    """Yield each letter that its legend lacks, that the house's alphabet lacks, or that means something else there."""
    for source in sources:
        line, meanings = legend(source)
        used, prose = shape_letters(source), prose_letters(source)
        for letter, meaning in meanings.items():
            allowed = ALPHABET.get(letter, ())
            if not any(re.match(re.escape(words) + r"\b", meaning) for words in allowed):
                rule = " or ".join(map(repr, allowed)) or "is not in the house's alphabet"
                yield Violation("letters", source.path, line, f"the legend says {letter} {meaning!r}: {rule}")
            if letter not in used and letter not in prose:
                yield Violation("letters", source.path, line, f"the legend says {letter}, which the file does not use")
        for letter, (first_line, word) in used.items():
            if letter not in meanings:
                yield Violation("letters", source.path, first_line, f"{word}: the legend lacks {letter}")


# What nothing uses.


@dataclass
class Definition:
    """A function, class, constant or method, and where its body lies."""

    source: Source
    name: str
    first_line: int
    last_line: int
    is_member: bool


def definitions(source: Source) -> Iterator[Definition]:
    """Yield what a file defines at its level and in its classes, but for private names and what Python calls itself.

    Nor methods of a class that extends one from another file or library, since that may be who calls them.
    """
    own = {node.name for node in source.tree.body if isinstance(node, ast.ClassDef)} | {
        "Protocol",
        "object",
        "Exception",
    }

    def of(body: list[ast.stmt], is_member: bool) -> Iterator[Definition]:
        for node in body:
            names: list[str] = []
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                names = [node.name]
            elif isinstance(node, ast.Assign) and not is_member:
                names = [target.id for target in node.targets if isinstance(target, ast.Name)]
            elif isinstance(node, ast.AnnAssign) and not is_member and isinstance(node.target, ast.Name):
                names = [node.target.id]
            start = min([node.lineno, *(item.lineno for item in getattr(node, "decorator_list", []))])
            for name in names:
                if not name.startswith("_"):
                    yield Definition(source, name, start, node.end_lineno or node.lineno, is_member)
            if isinstance(node, ast.ClassDef) and all(ast.unparse(base) in own for base in node.bases):
                yield from of(node.body, True)

    yield from of(source.tree.body, False)


def references(source: Source) -> Iterator[tuple[str, int, bool]]:
    """Yield each name that the file reads, its line, and whether it was an attribute, an import or in a string."""
    for node in source.nodes:
        if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Store):
            yield node.id, node.lineno, False
        elif isinstance(node, ast.Attribute) and not isinstance(node.ctx, ast.Store):
            yield node.attr, node.lineno, True
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            yield from ((alias.name, node.lineno, True) for alias in node.names)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.isidentifier():
            yield node.value, node.lineno, True


def unused_definitions(sources: list[Source]) -> Iterator[Violation]:
    """Yield what the product defines and does not use itself, so that tests alone could.

    Names are compared as words: a definition counts as used where anything of its name is read, in its own file or, as
    an attribute, an import or a string, in another; never by itself or by what is unused.
    """
    reads: dict[str, list[tuple[Source, int, bool]]] = defaultdict(list)
    for source in sources:
        for name, line, is_outward in references(source):
            reads[name].append((source, line, is_outward))
    candidates = [item for source in sources for item in definitions(source) if item.name not in CALLED_FROM_OUTSIDE]
    unused: list[Definition] = []

    def is_dead(source: Source, line: int) -> bool:
        return any(item.source is source and item.first_line <= line <= item.last_line for item in unused)

    def is_used(item: Definition) -> bool:
        for source, line, is_outward in reads[item.name]:
            inside = source is item.source and item.first_line <= line <= item.last_line
            log = is_outward or (source is item.source and not item.is_member)
            if log and not inside and not is_dead(source, line):
                return True
        return False

    while True:
        more = [item for item in candidates if item not in unused and not is_used(item)]
        if not more:
            break
        unused += more
    for item in unused:
        yield Violation("unused", item.source.path, item.first_line, f"the product itself never uses {item.name}")


# Counts.


def format_skips(sources: list[Source]) -> list[Violation]:
    """Return each comment that keeps the formatter off."""
    return [
        Violation("fmt: skip", source.path, token.start[0], "written by hand")
        for source in sources
        if "fmt:" in source.text  # most files are not worth their tokens
        for token in source.tokens
        if token.type == tokenize.COMMENT and re.match(r"#\s*fmt:\s*(skip|off)\b", token.string)
    ]


def comments_per_thousand(sources: list[Source]) -> float:
    """Return comments a thousand lines, both over all files."""
    comments = sum(token.type == tokenize.COMMENT for source in sources for token in source.tokens)
    return 1000 * comments / max(1, sum(source.text.count("\n") for source in sources))


RULES = {
    "class name": double_classes,
    "file name": double_file_names,
    "parameters": long_parameter_lists,
    "docstring": verbless_docstrings,
    "letters": wrong_letters,
    "unused": unused_definitions,
}


def main() -> None:
    """Print what is broken below the current folder, by file, and the counts."""
    root = Path.cwd()
    sources = read_sources(root)
    broken = [violation for rule in RULES.values() for violation in rule(sources)]
    for violation in sorted(broken, key=lambda one: (one.path, one.rule, one.line)):
        print(violation)
    everything = [*sources, *read_sources(root, ("tests",))]
    counts = Counter(violation.rule for violation in broken)
    print("; ".join(f"{rule} {counts[rule]}" for rule in RULES), end="; ")
    print(f"fmt: skip {len(format_skips(everything))}", end="; ")
    for room in PACKAGES:
        print(f"{room} {comments_per_thousand([one for one in sources if one.room == room]):.0f}", end=" ")
    print(f"comments in 1,000 lines (at least {COMMENTS_GOAL})")
    sys.exit(bool(broken))


if __name__ == "__main__":
    main()
