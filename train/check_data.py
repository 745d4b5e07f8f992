"""Whether a database of clips is whole, before a run finds out: one line for each row that cannot be used.

    python -m train.check_data clips

Every row is read. Bad rows are those that a run refuses, or replaces with skip_bad_rows=true: without latents, prompt
or text, of a wrong size, with NaN or Inf, or unreadable. Rows that a run takes but that look wrong are named as well:
one and the same number everywhere, numbers beyond any latent's, an empty prompt; so are rows beyond the number that is
recorded. Prompts that were there before are counted. The last line is the counts as JSON; the exit status is 1 if a row
is bad, 2 if the database cannot be opened.

Letters: R RGB, H W height and width.
"""

from __future__ import annotations

import hashlib
import json
import logging
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from selfforcing_core.atomic import print_result
from selfforcing_core.generate.cli import Parser
from train.args import mistake
from train.data import BadRow, ClipDatabase, Row

log = logging.getLogger(__name__)
LARGEST = 100.0  # Wan's latents are scaled to a standard deviation of about 1, and noise has 1


def doubts(row: Row) -> Iterator[str]:
    """Yield what looks wrong about a row that can be used, in a word or two."""
    low, high = (float(value) for value in row.states.aminmax())
    if low == high:
        yield "constant"
    if max(-low, high) > LARGEST:
        yield "huge"
    if not row.prompt.strip():
        yield "empty prompt"


def examine(data: ClipDatabase) -> dict[str, Any]:
    """Read every row, log the bad and the doubtful ones, one line each, and return the counts."""
    shape = data.shape
    bad: Counter[str] = Counter()
    doubtful: Counter[str] = Counter()
    prompts: set[bytes] = set()
    duplicates = images = 0
    for shard in data.shards:
        if shard.has_more():
            doubtful["more rows"] += 1
            log.warning("%s: holds more rows than it records; a run sees only those %d", shard.folder, len(shard))
    for index in tqdm(range(len(data)), ascii=True, unit="row"):
        shard, place = data.place(index)
        try:
            row = shard.row(place)
        except BadRow as error:  # by the very code with which a run reads it
            bad[error.kind] += 1
            log.error("%s", error)
            continue
        for doubt in doubts(row):
            doubtful[doubt] += 1
            log.warning("%s: row %d (%r) looks wrong: %s", shard.folder, place, row.prompt[:60], doubt)
        # Digests in place of prompts: a million long ones would take gigabytes.
        digest = hashlib.blake2b(row.prompt.encode(), digest_size=16).digest()
        duplicates += digest in prompts
        prompts.add(digest)
        images += row.image_RHW is not None
    return {
        "rows": len(data),
        "shape": list(shape),
        "good": len(data) - bad.total(),
        "bad": dict(bad),
        "doubtful": dict(doubtful),
        "duplicate_prompts": duplicates,
        "with_image": images,
    }


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    parser = Parser(prog="python -m train.check_data", description=str(__doc__).splitlines()[0])
    parser.add_argument("database", type=Path, help="database, or folder of shards")
    parser.add_argument("--image_height", type=int, help="of the pictures, where the database does not record it")
    parser.add_argument("--image_width", type=int)
    options = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    size = (options.image_height, options.image_width) if options.image_height and options.image_width else None
    try:
        with logging_redirect_tqdm():
            counts = examine(ClipDatabase(options.database, size))
        print_result(json.dumps(counts))
    except (ValueError, OSError) as error:
        return mistake("train.check_data", error)
    return 1 if counts["bad"] else 0  # so that a script stops before it starts a run


if __name__ == "__main__":
    sys.exit(main())
