"""Which tests are slow, and which need something special: `pytest -m "not slow"` is the quick part.

By file, so that nobody has to time a test to add one. A file is slow when all its tests together took more than about
five seconds, 2026-11-27.
"""

from __future__ import annotations

SLOW = frozenset(
    """
    attacks/test_every_way_in attacks/test_footers attacks/test_fuzzed_label_sets attacks/test_hostile_files
    attacks/test_hostile_servers attacks/test_rot attacks/test_waits cli/test_commands cli/test_display
    cli/test_ending cli/test_figures cli/test_odd_names cli/test_options_without_effect clients/test_card
    clients/test_readers end_to_end/test_a_student_learns end_to_end/test_examples end_to_end/test_gpu_check
    end_to_end/test_real_teachers end_to_end/test_recipes end_to_end/test_teach
    invariants/test_2_same_build_same_labels invariants/test_3_the_manifest_commits invariants/test_8_memory_is_flat
    rooms/builder/test_clocks rooms/builder/test_disguises rooms/builder/test_dry_run rooms/builder/test_ends
    rooms/builder/test_extend rooms/builder/test_faults rooms/builder/test_forwards rooms/builder/test_parts
    rooms/builder/test_plan rooms/builder/test_pool rooms/builder/test_ray rooms/builder/test_stop
    rooms/builder/test_store rooms/builder/test_watching rooms/exchange/test_again rooms/exchange/test_convert
    rooms/exchange/test_dataset_reinforcement rooms/exchange/test_hub rooms/exchange/test_merge
    rooms/exchange/test_publish_and_pull rooms/exchange/test_signing rooms/images/test_parquet_pages
    rooms/images/test_sources rooms/loader/test_batch_knowledge rooms/loader/test_crop_dataset
    rooms/loader/test_crop_loader rooms/loader/test_environments rooms/loader/test_epoch_settings
    rooms/loader/test_epochs rooms/loader/test_joined_images rooms/loader/test_kinds rooms/loader/test_ranks
    rooms/loader/test_shared_cache rooms/loader/test_skipping rooms/loader/test_stats rooms/loader/test_streaming
    rooms/loader/test_transform rooms/loader/test_views rooms/loader/test_workers rooms/report/test_in_a_browser
    rooms/report/test_preview rooms/report/test_writing rooms/teachers/test_checkpoints rooms/teachers/test_digest
    rooms/teachers/test_hf_and_openclip rooms/teachers/test_onnx_teachers rooms/teachers/test_outputs
    rooms/teachers/test_teachers rooms/test_bench rooms/test_crop_kinds rooms/test_on_a_gpu rooms/test_scratch
    rooms/test_scratch_of_commands
    """.split()
)
NETWORK = frozenset(
    """
    attacks/test_hostile_servers attacks/test_waits rooms/exchange/test_hub rooms/exchange/test_publish_and_pull
    rooms/exchange/test_again rooms/loader/test_streaming rooms/test_clients_over_http rooms/test_remote
    rooms/test_remote_nginx rooms/builder/test_store rooms/test_crop_kinds
    """.split()
)


def markers_of(name: str, skip_reasons: list[str]) -> list[str]:
    """The markers of a test in the file `name` (below tests/, without its ending), which may be skipped for reasons."""
    wanted = {
        "slow": name in SLOW,
        "network": name in NETWORK,
        "ray": name.rpartition("/")[2] in ("test_ray", "test_cluster", "test_ray_worker"),
        "gpu": any("GPU" in reason for reason in skip_reasons),
    }
    return [marker for marker, is_wanted in wanted.items() if is_wanted]
