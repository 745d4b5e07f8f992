"""The live player's side of the server: frames to the page that queued the prompt, and its commands back.

Out: the event "selfforcing.live" with JPEGs and figures. Back: POST /selfforcing/live, a JSON object with the run's
secret name, the client id of the page that queued it, and an action; commands of other pages are refused. Who may read
the server's queue, and so may interrupt what it runs, may also finish it early: by prompt and client id, without the
name. How messages go out, and that none pile up, is the outbox's business.

Letters: V video frames, R RGB, H W height and width in pixels.
"""

from __future__ import annotations

import json
import logging
import math
import time
import uuid
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from aiohttp import web
from torch import Tensor

from ...selfforcing_core.geometry import pixel_frames
from ...selfforcing_core.policy import HISTORIES
from ...selfforcing_core.prompt_schedule import MOST_BLEND, Transition
from . import host, page
from .figures import Figures
from .guider_prompts import Reader
from .outbox import AGAIN_AFTER, EVENT, PATIENCE, Outbox, thumbnails
from .pacing import Viewer
from .page_steering import PageSteering
from .steering_record import SteeringRecord

ROUTE = "/selfforcing/live"
FRAME_RATE = 24  # at most so many frames for every second that generating took: a fast run would fill the connection
LISTEN = 0.1  # seconds between two looks at what a waiting chunk waits for
TAB = "selfforcing_tab"  # under which the page tells which of its open workflows queued the prompt
ACTIONS = ("prompt", "seed", "hold", "go_on", "reroll", "finish", "shown", "ack")
COMMAND_BYTES = 65536  # many times the longest prompt, so that nobody fills the server's memory
PROMPT_LETTERS = 10000  # the encoder reads 512 tokens; more than that is a mistake of the clipboard

log = logging.getLogger(__name__)
# The server's thread has nothing but a name to find a run by, so these two belong to the process.
_runs: dict[str, Live] = {}
_steered: Counter[int] = Counter()  # by the seed of their node: runs whose result is not that of its inputs alone


class Live:
    """One run of a sampler as its page sees and steers it. Made by `open_live`; `close` ends it."""

    def __init__(
        self,
        audience: page.Audience,
        record: SteeringRecord,
        *,
        fps: float,
        lengths: Sequence[int],
        reader: Reader | None,
        seed: int,
        pace: float,
        hidden: Any,
    ) -> None:
        self.name = uuid.uuid4().hex  # a secret: whoever knows it may steer
        self.audience, self.record, self.reader = audience, record, reader
        self.own_seed, self.pace = seed, pace or None
        self.viewer, self.figures, self.steering = Viewer(fps), Figures(fps), PageSteering()
        self.read_text = ""  # the text of the prompt that was read last
        self.is_steered = False  # the result is another than that of the node's inputs
        self.is_again = False  # the coming frames replace those of the chunk shown last
        _runs[self.name] = self  # the outbox's thread takes it out when its last message is sent
        fixed_fields = {
            "run": self.name,
            "prompt_id": audience.prompt,
            "node": audience.node,
            "num_chunks": len(lengths),
            "num_frames": pixel_frames(sum(lengths)),
            "fps": fps,
            "can_prompt": reader is not None,
            "can_finish": True,
            "pace": self.pace,
            **_queued_from(hidden),
        }
        self.outbox = Outbox(
            lambda message: page.send(EVENT, message, audience.client),
            fixed_fields,
            lambda: {"ahead": self.viewer.seconds_ahead(self.figures.num_frames), "events": record.events},
            lambda: _runs.pop(self.name, None),
        )
        self.outbox.put(
            state="sampling",
            chunk=0,
            stats={"fps": None, "first_frame_seconds": None, "real_time": None, "share_of_limit": None},
        )

    @property
    def has_page(self) -> bool:
        """Return whether a player has answered."""
        return self.outbox.num_answered > 0

    @property
    def is_finishing(self) -> bool:
        """Return whether the present chunk is to be the last."""
        return self.steering.is_finishing

    # ---------------------------------------------------- the sampling thread --
    def show(self, frames_VRHW: Tensor, first_frame: int, chunk: int) -> None:
        """Show finished frames in [0, 1] of a chunk, numbered from `first_frame`; chunk counts the finished ones."""
        num_frames = first_frame + len(frames_VRHW)
        if not len(frames_VRHW):
            self.figures.num_frames = num_frames
            self.outbox.put(chunk=chunk)
            return
        rate = self.figures.count(num_frames)
        # A run that is faster than it plays is shown with fewer frames, each at its own time; the file has all of them.
        every = max(1, math.ceil((rate or 0) / FRAME_RATE))
        frames = list(zip(range(first_frame, num_frames, every), thumbnails(frames_VRHW[::every])))
        self.outbox.put(frames, is_again=self.is_again, chunk=chunk, stats=self.figures.stats(rate))
        self.is_again = False

    def wants_again(self, *, can_hold: bool = True, is_last: bool = False, is_final: bool = False) -> bool:
        """Wait while the chunk that was just shown is held, or far ahead; return whether it is to be made once more.

        can_hold: it was made, not given. is_last: nothing follows, so nothing can be ahead. is_final: its policy makes
        no chunk once more, which is said where it is asked for.
        """
        wait_start, steering = time.perf_counter(), self.steering
        with steering.changed:
            steering.next_seed, steering.is_released = None, False
            # Condition.wait lets go of the lock, so that the page's commands come in meanwhile.
            self._wait(can_hold=can_hold, is_last=is_last)
            self.outbox.put(state="sampling")  # before what else there is to tell, which nobody is to take for a hold
            self.is_again = steering.next_seed is not None and not steering.is_finishing
            if self.is_again and is_final:
                self.say("this model's cache policy denoises chunks together, and makes none of them once more")
                self.is_again = False
            if self.is_again:
                self._roll_again(wait_start)
            self.figures.go_on(wait_start)
            return self.is_again

    def _wait(self, *, can_hold: bool, is_last: bool) -> None:
        """Wait until there is no reason left; say the reason, and again for a page that was loaded anew."""
        latest_reason, reported_at, deadline = "", 0.0, time.monotonic() + PATIENCE
        while reason := self._reason(can_hold=can_hold, is_last=is_last):
            self.steering.is_waiting = reason == "held"
            if reason != latest_reason or time.monotonic() > reported_at + AGAIN_AFTER:
                latest_reason, reported_at = reason, time.monotonic()
                self.outbox.put(state=reason)
            self.steering.changed.wait(LISTEN)
            host.check_interrupted()
            if page.is_listening(self.audience.client):
                deadline = time.monotonic() + PATIENCE
            elif time.monotonic() > deadline:
                log.warning("the page that the run waited for (%s) is gone; the run goes on", reason)
                self.steering.is_held = False
                self.viewer.forget()
        self.steering.is_waiting = False

    def _reason(self, *, can_hold: bool, is_last: bool) -> str:
        """Return why to wait before the next chunk; "" if there is no reason."""
        steering = self.steering
        if steering.is_finishing or steering.next_seed is not None:
            return ""
        if can_hold and steering.is_held and not steering.is_released:
            return "held"
        ahead = None if is_last or self.pace is None else self.viewer.seconds_ahead(self.figures.num_frames)
        return "ahead" if ahead is not None and self.pace is not None and ahead > self.pace else ""

    def _roll_again(self, wait_start: float) -> None:
        start, seed = self.steering.chunk_start, self.steering.next_seed
        assert seed is not None
        self.steering.chunk_seed = seed
        self.record.reroll(start, seed)
        self.record.use(start, seed)
        self.figures.throw_away(wait_start)
        self._tell_schedule()

    def seed_at(self, start_frame: int) -> int | None:
        """Return the seed of this chunk's noise; None is the run's own."""
        seed, is_reseeded = self.steering.begin(start_frame)
        self.record.use(start_frame, seed)
        if is_reseeded and seed is not None:
            self.record.seed(start_frame, seed)
            self._tell_schedule()
        if seed is not None:
            self._count()
        return seed

    def read_prompt(self, check: Callable[[list[Any]], None]) -> tuple[list[Any], Transition] | None:
        """Return the CONDITIONING of the prompt that was typed and how it is to begin; None if there is none.

        One that cannot be read, or that `check` refuses, is said to be refused and is none.
        """
        typed = self.steering.take_prompt()
        if typed is None or self.reader is None:
            return None
        text, transition = typed
        try:
            conditioning = self.reader(text)
            check(conditioning)
        except host.Interrupted:  # the stop button, which ends the run in any case
            raise
        except Exception as error:  # a long run does not end because of a sentence typed into it
            log.exception("the prompt typed into the player could not be read")
            self.outbox.put(message=f"the prompt was not taken: {error}")
            return None
        self._count()
        self.read_text = text
        return conditioning, transition

    def took_prompt(self, start_frame: int, transition: Transition) -> None:
        """Note that the prompt that was read last begins with this chunk."""
        self.record.use(start_frame, None)
        self.record.prompt(start_frame, self.read_text, transition)
        self._tell_schedule()

    def _tell_schedule(self) -> None:
        self.outbox.put(schedule=self.record.text())

    def _count(self) -> None:
        """Note that the result is another than that of the node's inputs from here on."""
        if not self.is_steered:  # once for a run: one more is enough to make it another
            self.is_steered = True
            _steered[self.own_seed] += 1

    def say(self, message: str) -> None:
        """Show the user a line below the player."""
        self.outbox.put(message=message)

    def close(self, ending: str, files: list[dict[str, Any]]) -> None:
        """End the run, whole, finished early or stopped, that has written these files; return at once."""
        if ending == "early":
            self._count()
        self.outbox.put(state="done", ending=ending, files=files, schedule=self.record.text())
        self.outbox.close()

    # ------------------------------------------------------ the server's loop --
    def command(self, message: dict[str, Any]) -> None:
        """Do what the page asks for. Raises ValueError with value, rule and remedy."""
        action = message.get("action")
        if action == "ack":
            self._acknowledged(message)
            return
        if action == "shown":
            self._saw(_whole(message, "frame"))
            return
        if self.outbox.is_closed:
            raise ValueError("the run is over; queue it again")
        if action == "prompt":
            self.steering.type_prompt(*self._typed(message))
        elif action == "seed":
            self.steering.reseed(_whole(message, "seed"))
        elif action == "hold":
            self.steering.hold()
        elif action == "go_on":
            self.steering.go_on()
        elif action == "reroll":
            self.steering.reroll(_whole(message, "seed"))
        elif action == "finish":
            self.steering.finish()
        else:
            raise ValueError(f"action {str(action)[:40]!r} is unknown; use {', '.join(ACTIONS)}")

    def refusal(self, message: dict[str, Any]) -> str | None:
        """Return why a command is not taken from whoever sent it; None: it is. An older page's answers harm nobody."""
        client = message.get("client")
        if client == self.audience.client or (client is None and message.get("action") == "ack"):
            return None
        if client is None:
            return "this page's player is older than its server and does not say who it is; reload the page"
        return "only the page that queued this run may steer it; queue it from this page"

    def _acknowledged(self, message: dict[str, Any]) -> None:
        frame = _whole(message, "shown") if message.get("shown") is not None else None
        self.outbox.acknowledge(_whole(message, "number"))
        if frame is not None:
            self._saw(frame)

    def _saw(self, frame: int) -> None:
        with self.steering.changed:  # whoever waits because too much is ahead looks again
            self.viewer.tell(frame)
            self.steering.changed.notify_all()

    def _typed(self, message: dict[str, Any]) -> tuple[str, Transition]:
        text, history = message.get("text"), message.get("history")  # without one, the policy says
        if self.reader is None:
            raise ValueError("nothing here can read a new prompt; connect clip to the sampler")
        if not isinstance(text, str) or not text.strip() or len(text) > PROMPT_LETTERS:
            count = len(text.strip()) if isinstance(text, str) else "no"
            raise ValueError(f"a prompt of {count} letters cannot be followed; write 1 to {PROMPT_LETTERS}")
        if "\0" in text or any("\ud800" <= letter <= "\udfff" for letter in text):
            raise ValueError("the prompt holds NUL or half a character, which no file can keep; leave it out")
        if history is not None and history not in HISTORIES:
            raise ValueError(
                f"history {str(history)[:40]!r} is unknown; use {' or '.join(HISTORIES)}, or none: as the policy says"
            )
        blend = _whole(message, "blend") if "blend" in message else 1
        if not 1 <= blend <= MOST_BLEND:
            raise ValueError(f"blend {blend} is a number of chunks; use 1 to {MOST_BLEND}")
        return text.strip(), Transition(history, blend)


def open_live(
    record: SteeringRecord,
    *,
    fps: float,
    lengths: Sequence[int],
    reader: Reader | None,
    seed: int,
    pace: float,
    hidden: Any,
) -> Live | None:
    """Return a player for the node that runs now, with this seed and hidden inputs; None where no page queued it.

    lengths: latent frames of each chunk. pace: seconds of video that may be made and not yet shown; 0 is no limit.
    """
    audience = page.audience()
    if audience is None:
        return None
    return Live(audience, record, fps=fps, lengths=lengths, reader=reader, seed=seed, pace=pace, hidden=hidden)


def times_steered(seed: int | None) -> int:
    """Return how many runs with this seed became something else by what was done in their players; None: any seed.

    ComfyUI files a result under its node's inputs. With this count among them a steered one is never found again. By
    the seed and not by the node, since ComfyUI finds results of equal inputs for every node.
    """
    return _steered.total() if seed is None else _steered[seed]


def add_route() -> None:
    """Add the route of the page's commands; once, while ComfyUI loads the pack."""
    server = page.server()
    if server is not None:
        # ComfyUI adds what is in this table to its application when all packs are loaded.
        server.routes.post(ROUTE)(_answer)


async def _answer(request: web.Request) -> web.Response:
    try:
        body = b""
        # Read in pieces: a body without a length, sent on and on, is cut off as well.
        async for part in request.content.iter_chunked(COMMAND_BYTES):
            body += part
            if len(body) > COMMAND_BYTES:
                raise ValueError(f"a command of more than {COMMAND_BYTES} bytes is not read; send less")
        message = _parsed(body)
        live = _named(message)
        if live is None and message.get("action") in ("ack", "shown"):  # of the last message: the run is gone by then
            return web.json_response({})
        # 404 tells the page that the run is over, 403 and 400 that this command was not taken.
        if live is None:
            return web.json_response({"error": _not_running(message)}, status=404)
        refusal = live.refusal(message)
        if refusal is not None:
            return web.json_response({"error": refusal}, status=403)
        live.command(message)
    except ValueError as error:
        return web.json_response({"error": str(error)}, status=400)
    return web.json_response({})


def _named(message: dict[str, Any]) -> Live | None:
    """Return the run that a command is for: by its name, or, to finish it, by the prompt that is being executed."""
    if "run" in message or message.get("action") != "finish":
        return _runs.get(str(message.get("run")))
    running = (live for live in list(_runs.values()) if not live.outbox.is_closed)
    return next((live for live in running if live.audience.prompt == message.get("prompt_id")), None)


def _not_running(message: dict[str, Any]) -> str:
    if "run" in message or message.get("action") != "finish":
        return "this run is over; queue it again"
    return (
        "nothing is running that can be finished early: a streaming node with its player switched on, of a prompt "
        "queued with a client id, while it samples; interrupt it instead, or wait until it samples"
    )


def _queued_from(hidden: Any) -> dict[str, str]:
    """Return which of a page's workflows queued the run: the workflow's id, the page's own mark; {} from scripts."""
    pnginfo = getattr(hidden, "extra_pnginfo", None)
    workflow = pnginfo.get("workflow") if isinstance(pnginfo, dict) else None
    if not isinstance(workflow, dict):
        return {}
    extra = workflow.get("extra")
    origin = {"workflow": workflow.get("id"), "tab": extra.get(TAB) if isinstance(extra, dict) else None}
    return {name: value for name, value in origin.items() if isinstance(value, str)}


def _parsed(body: bytes) -> dict[str, Any]:
    try:
        message = json.loads(body)
    except (ValueError, RecursionError) as error:  # the latter of "[" a few thousand times
        raise ValueError(f"{body[:40]!r} is no command; send a JSON object") from error
    if not isinstance(message, dict):
        raise ValueError(f"{body[:40]!r} is no command; send a JSON object")
    return message


def _whole(message: dict[str, Any], name: str) -> int:
    value = message.get(name)
    # bool is a kind of int in Python. 2**64: torch takes no larger seeds, and the page's numbers end before that.
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**64:
        raise ValueError(f"{name} {str(value)[:40]!r} is no whole number from 0 to 2**64 - 1")
    return value
