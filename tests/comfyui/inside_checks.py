"""Run by ComfyUI's Python with its checkout on the path: what cannot be asked over HTTP, measured and printed as JSON.

python inside_checks.py PACK FOLDER [OPTION ...]
PACK: this repository; FOLDER: where random weights may be written; OPTION: of ComfyUI's command line
"""

from __future__ import annotations

import json
import logging
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path.cwd()))  # ComfyUI's own `nodes` comes first
import inside  # before torch and ComfyUI: it sets the command line that they read
import inside_codecs
import inside_experts
import inside_lora
import inside_patches
import inside_player
import inside_presets
import inside_rollout
import inside_runs
import torch

CHECKS: tuple[Callable[[], Any], ...] = (
    inside.broken_packages,
    inside_rollout.a_trained_lora_is_the_merged_network,
    inside_codecs.vaes_of_the_host_stream,
    inside_codecs.taehv_streams_latent_by_latent,
    inside_codecs.text_encoders,
    inside_runs.a_network_that_had_to_leave_comes_back,
    inside_rollout.the_hosts_model_gives_the_cores_video,
    inside_rollout.steps_of_the_first_chunk_and_a_last_one_of_0,
    inside_rollout.condition_channels_are_sliced_per_chunk,
    inside_rollout.channels_alone_condition_wan_2_2,
    inside_rollout.a_model_of_the_hosts_loader_is_patched,
    inside_rollout.exports_are_what_they_say,
    inside_rollout.number_types,
    inside_rollout.layers_without_casting_compute_in_bfloat16,
    inside_rollout.compiled,
    inside_runs.memory_estimate,
    inside_runs.out_of_memory,
    inside_runs.interrupts,
    inside_runs.states,
    inside_runs.a_prompt_typed_into_a_resumed_run,
    inside_runs.a_prompt_becomes_the_next_over_chunks,
    inside_rollout.the_hosts_own_causal_sampler,
    inside_patches.what_is_set_on_the_forward_pass_is_followed,
    inside_patches.modules_and_prompts_of_others_are_followed,
    inside_runs.a_model_can_be_loaded_again,
    inside_patches.what_cannot_be_followed_is_refused,
    inside_rollout.a_loras_modulation_is_the_merged_network,
    inside_rollout.a_file_with_base_and_lora_is_the_merged_network,
    inside_lora.lora_and_its_kin_are_as_in_the_host,
    inside_rollout.first_and_last_frame_models_are_not_made_causal,
    inside_rollout.a_scaled_8_bit_file_is_the_network_it_stands_for,
    inside_experts.two_models_give_the_cores_video,
    inside_experts.two_models_with_36_channels_read_a_picture,
    inside_experts.a_released_pair_is_joined_by_its_preset,
    inside_experts.two_models_go_on_and_change_their_prompt,
    inside_experts.one_of_two_models_is_loaded_at_a_time,
    inside_experts.two_models_and_their_loras,
    inside_experts.what_does_not_go_with_two_models_is_refused,
    inside_presets.released_files_run_by_their_presets,
    inside_rollout.files_of_other_kinds_are_refused_by_name,
    inside_player.a_run_waits_for_its_viewer,
    inside_player.a_picture_that_moves_is_taken_to_move_on,
    inside_player.a_new_loader_never_pairs_a_bundled_part_with_a_real_one,
    inside_player.the_first_prompt_is_found_in_the_graph_or_not_guessed,
    inside_codecs.lighttaew2_1_decodes_as_in_the_host,
    inside_codecs.vaes_of_other_spaces,
    inside_player.a_steered_run_is_kept_in_its_files,
)


def main() -> None:
    logging.disable(logging.CRITICAL)
    results: dict[str, Any] = {}
    with torch.inference_mode():
        for check in CHECKS:
            try:
                results[check.__name__] = check()
            except Exception as error:  # one check must not hide the others
                results[check.__name__] = {
                    "failed": f"{type(error).__name__}: {error}",
                    "trace": traceback.format_exc(),
                }
    print("\n" + json.dumps(results))


if __name__ == "__main__":
    main()
