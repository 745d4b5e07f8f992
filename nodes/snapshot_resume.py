"""A rollout's state on disk: save it, load it, go on from it as often as wanted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import folder_paths
from comfy_api.latest import io

from ..selfforcing_core.snapshot import Snapshot
from .adapter import folders, host
from .adapter.chunk_sampler import SnapshotHolder
from .stream_sampler import State

SUFFIX = ".state.safetensors"


class SelfForcingSnapshot(io.ComfyNode):
    """State to file."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return host.schema(
            node_id="SelfForcingSnapshot",
            display_name="Snapshot (Self Forcing)",
            category="SelfForcing",
            search_aliases=["save state", "checkpoint rollout", "pause video"],
            description="Saves where a run ended: the video so far and the KV cache, so that it can go on later, more "
            "than once, and with another prompt. A file is as large as the cache.",
            inputs=[
                State.Input("state", tooltip="From a sampler of this pack with keep_state on."),
                io.String.Input(
                    "filename_prefix",
                    default="selfforcing/state",
                    tooltip="Name in the output folder; a number and .state.safetensors are added.",
                ),
                io.Latent.Input(
                    "after",
                    optional=True,
                    tooltip="The sampled LATENT. Needed behind Sampler (Self Forcing), whose state is there only when "
                    "sampling is done.",
                ),
            ],
            outputs=[State.Output(display_name="state", tooltip="The same state, to go on with in this graph.")],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, state: SnapshotHolder, filename_prefix: str, after: Any = None) -> io.NodeOutput:
        snapshot = state.filled()
        folder, name, counter, _, _ = folder_paths.get_save_image_path(
            filename_prefix, folder_paths.get_output_directory()
        )
        # 0.3.64 reads no number in front of two endings (00001.state.safetensors) and would count to 1 each time.
        names = {path.name for path in Path(folder).glob(f"{name}_*{SUFFIX}")}
        while f"{name}_{counter:05}{SUFFIX}" in names:
            counter += 1
        snapshot.save(Path(folder) / f"{name}_{counter:05}{SUFFIX}")
        return io.NodeOutput(SnapshotHolder(snapshot))


class SelfForcingResume(io.ComfyNode):
    """File to state."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return host.schema(
            node_id="SelfForcingResume",
            display_name="Resume (Self Forcing)",
            category="SelfForcing",
            search_aliases=["load state", "continue video"],
            description="Loads what Snapshot (Self Forcing) saved. Give it to a sampler with the same model, size and "
            "window; a longer length goes on, another prompt or seed branches off.",
            inputs=[
                io.Combo.Input(
                    "state_name",
                    # As the page has it when it is loaded: R refreshes the list, as for models.
                    options=folders.snapshot_choices(SUFFIX),
                    tooltip="A saved state of the output folder, or of the input folder.",
                )
            ],
            outputs=[State.Output(display_name="state", tooltip="For a sampler of this pack.")],
        )

    @classmethod
    def execute(cls, state_name: str) -> io.NodeOutput:
        return io.NodeOutput(SnapshotHolder(Snapshot.load(folders.snapshot_file(state_name))))

    @classmethod
    def fingerprint_inputs(cls, state_name: str = "", **_: object) -> str:
        # A file that was written anew under its name is loaded anew.
        return folders.fingerprint(folders.snapshot_file(state_name)) if state_name else ""
