"""Faults as data: each is one wrong text in one file of the package, and the test that must turn red under it.

`test_faults.py` puts them into a copy of the package, one at a time. A fault that no test finds shows a test that is missing.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Fault:
    """One fault.

    Attributes:
        name: of this fault, unique.
        file: the path in the repository.
        right: a text that occurs exactly once in the file.
        wrong: what replaces it.
        test: the pytest node that fails under the fault, `tests/FILE.py::FUNCTION`.
        why: what a user would see, or what the test compares with.
    """

    name: str
    file: str
    right: str
    wrong: str
    test: str
    why: str


REPORTING = (
    # ---- curves.png, the tables, the progress line, metrics.csv, TensorBoard
    Fault(
        "the curves' x axis",
        "falcon_fast/evaluation/report.py",
        'numbers.get("epoch", math.nan)',
        'numbers.get("step", math.nan)',
        "tests/evaluation/test_report.py::test_what_was_not_measured_is_a_gap_and_qualities_share_an_axis",
        "steps under the label `epoch`",
    ),
    Fault(
        "the seconds left",
        "falcon_fast/training/records/console.py",
        '* (self._total - row["step"])',
        '* row["step"]',
        "tests/training/records/test_console.py::test_the_time_left_is_that_of_the_steps_to_come",
        "the seconds that are over as those that are left",
    ),
    Fault(
        "prior and invariance",
        "falcon_fast/training/records/logs.py",
        "loss, prior, invariance, *accuracy =",
        "loss, invariance, prior, *accuracy =",
        "tests/training/records/test_logs.py::test_every_metric_of_a_row_stands_in_its_column",
        "two columns of metrics.csv swapped",
    ),
    Fault(
        "the logged learning rate",
        "falcon_fast/training/records/logs.py",
        "rate.of(run.config.optimizer.lr)",
        "run.config.optimizer.lr",
        "tests/training/records/test_logs.py::test_every_metric_of_a_row_stands_in_its_column",
        "the peak rate at every step",
    ),
    Fault(
        "TensorBoard's tags",
        "falcon_fast/training/records/logs.py",
        'self._events.add_scalar(name, value, row["step"])',
        'self._events.add_scalar("train/" + name, value, row["step"])',
        "tests/training/records/test_logs.py::test_tags_are_the_columns_and_steps_the_rows",
        "tags that are not the columns' names",
    ),
    Fault(
        "the share of waiting for data",
        "falcon_fast/training/records/logs.py",
        '"data_wait": self._waited / seconds',
        '"data_wait": self._waited / self._steps',
        "tests/training/records/test_logs.py::test_utilisation_is_the_networks_and_the_losss_flop_over_the_peak",
        "seconds a step instead of a share",
    ),
    Fault(
        "MFU of one device in the log",
        "falcon_fast/training/records/logs.py",
        "/ (peak * run.processes.world_size)",
        "/ peak",
        "tests/training/records/test_logs.py::test_utilisation_is_of_all_devices",
        "MFU that grows with the number of devices",
    ),
    Fault(
        "info denies the extension",
        "falcon_fast/cli/info.py",
        "if cpu_extension",
        "if not cpu_extension",
        "tests/cli/test_info.py::test_both_ways_of_an_installation",
        "`not built` where it is",
    ),
    Fault(
        "the planner's factor",
        "falcon_fast/objective/planner.py",
        "others[0].seconds / best.seconds",
        "best.seconds / others[0].seconds",
        "tests/objective/test_planner.py::test_the_factor_is_the_ratio_of_the_times_in_the_table",
        "a faster plan that is `0.5 times as fast`",
    ),
    # ---- profile
    Fault(
        "mean instead of median",
        "falcon_fast/profiling/measure.py",
        "        median = statistics.median(self.timings.steps)\n",
        "        median = statistics.fmean(self.timings.steps)\n",
        "tests/profiling/test_measure.py::test_throughput_is_of_the_median_step",
        "one slow step lowers images/s",
    ),
    Fault(
        "percentiles swapped",
        "falcon_fast/profiling/measure.py",
        "self.images / median, self.images / slow, self.images / fast",
        "self.images / median, self.images / fast, self.images / slow",
        "tests/profiling/test_measure.py::test_throughput_is_of_the_median_step",
        "the slowest steps as the fastest",
    ),
    Fault(
        "MFU of one device in a profile",
        "falcon_fast/profiling/measure.py",
        "/ (peak * self.processes)",
        "/ peak",
        "tests/profiling/test_measure.py::test_utilisation_is_a_share_of_all_processes_devices",
        "MFU that grows with the number of processes",
    ),
    Fault(
        "the bound of one micro-batch",
        "falcon_fast/profiling/measure.py",
        "Bound(*(run.config.training.accumulate * seconds for seconds in bound))",
        "Bound(*bound)",
        "tests/profiling/test_measure.py::test_the_networks_bound_is_that_of_all_micro_batches",
        "accumulation looks like overhead",
    ),
    Fault(
        "phases of all steps",
        "falcon_fast/profiling/phases.py",
        "middle = _middle(each, totals)",
        "middle = each",
        "tests/profiling/test_phases.py::test_only_steps_after_the_warm_up_are_timed",
        "one slow step in the mean of the phases",
    ),
    Fault(
        "the warm-up is timed",
        "falcon_fast/profiling/phases.py",
        "range(WARM_UP):\n        steps.take()\n",
        "range(WARM_UP):\n        steps.take(watch)\n",
        "tests/profiling/test_phases.py::test_only_steps_after_the_warm_up_are_timed",
        "compilation counts as a step",
    ),
    Fault(
        "a trace without phases",
        "falcon_fast/profiling/phases.py",
        "range(TRACED):\n            steps.take(watch)\n",
        "range(TRACED):\n            steps.take()\n",
        "tests/cli/test_profile.py::test_a_table_for_people_and_a_trace_for_browsers",
        "a trace that does not name the phases",
    ),
    Fault(
        "when waiting counts",
        "falcon_fast/profiling/diagnosis.py",
        "WAITING = 0.2 ",
        "WAITING = 0.4 ",
        "tests/profiling/test_diagnosis.py::test_waiting_counts_from_a_fifth_of_a_step",
        "a third of a step spent waiting is not mentioned",
    ),
    Fault(
        "when launches count",
        "falcon_fast/profiling/diagnosis.py",
        "ISSUING = 0.9 ",
        "ISSUING = 0.6 ",
        "tests/profiling/test_diagnosis.py::test_launches_count_from_nine_tenths_of_a_step",
        "`launches` where the device is busy",
    ),
    Fault(
        "when overhead counts",
        "falcon_fast/profiling/diagnosis.py",
        "BUSY = 0.5\n",
        "BUSY = 0.25\n",
        "tests/profiling/test_diagnosis.py::test_overhead_is_where_less_than_half_of_the_networks_time_is_needed",
        "`compute` where the device is mostly idle",
    ),
    # ---- profile --predict, FLOP and bytes, the table of GPUs
    Fault(
        "passes of the photometric stage",
        "falcon_fast/profiling/prediction.py",
        "PASSES = 6\n",
        "PASSES = 60\n",
        "tests/profiling/test_prediction.py::test_the_photometric_stage_passes_six_times_over_the_views",
        "the photometric stage takes ten times as long",
    ),
    Fault(
        "the links' rate",
        "kernels/gpu/devices.py",
        "_A100 = Reached(250e12, 18e12, 1.7e12, 4.0e12, 2.4e12, 230e9)",
        "_A100 = Reached(250e12, 18e12, 1.7e12, 4.0e12, 2.4e12, 23e9)",
        "tests/profiling/test_prediction.py::test_an_all_reduce_passes_over_the_links",
        "communication takes ten times as long",
    ),
    Fault(
        "half an all-reduce",
        "falcon_fast/profiling/prediction.py",
        "factor = 2 * (gpus - 1) / gpus",
        "factor = (gpus - 1) / gpus",
        "tests/profiling/test_prediction.py::test_an_all_reduce_passes_over_the_links",
        "a ring passes the bytes twice",
    ),
    Fault(
        "the host's seconds a call",
        "kernels/gpu/devices.py",
        "CALL_SECONDS = 8e-6 ",
        "CALL_SECONDS = 8e-9 ",
        "tests/profiling/test_prediction.py::test_the_host_takes_eight_microseconds_a_call",
        "no prediction is ever bound by launches",
    ),
    Fault(
        "predicted MFU of one GPU",
        "falcon_fast/profiling/prediction.py",
        "/ (rate * gpus)",
        "/ rate",
        "tests/profiling/test_prediction.py::test_utilisation_is_of_the_data_sheets_of_all_gpus",
        "MFU that grows with the number of GPUs",
    ),
    Fault(
        "bytes of an expanded tensor",
        "falcon_fast/profiling/roofline.py",
        "min(x.numel() * x.element_size(), x.untyped_storage().nbytes())",
        "x.numel() * x.element_size()",
        "tests/profiling/test_roofline.py::test_an_expanded_tensor_is_read_once",
        "broadcast operands count as if they were copied",
    ),
    Fault(
        "the loss's floor",
        "falcon_fast/hardware/flops.py",
        "else 8.0 * n * f * c",
        "else 4.0 * n * f * c",
        "tests/hardware/test_flops.py::test_the_losss_floor",
        "half of the loss's FLOP",
    ),
    Fault(
        "any word of a name",
        "kernels/gpu/devices.py",
        "if all(word in lower for word",
        "if any(word in lower for word",
        "tests/kernels/gpu/test_devices.py::test_devices_are_known_by_the_names_that_cuda_gives_them",
        "an H100 with the data sheet of an A100",
    ),
)

CORE = (
    Fault(
        "one cross-entropy twice",
        "falcon_fast/objective/reference.py",
        "cross_21 = -torch.sum(torch.exp(log_p1) * log_p2, dim=1).mean()",
        "cross_21 = -torch.sum(torch.exp(log_p2) * log_p1, dim=1).mean()",
        "tests/objective/test_reference.py::test_golden_vectors",
        "the views are not treated alike",
    ),
    Fault(
        "the prior's constant",
        "falcon_fast/objective/reference.py",
        "torch.exp(log_pbar) * (log_pbar + log_c)",
        "torch.exp(log_pbar) * log_pbar",
        "tests/objective/test_reference.py::test_golden_vectors",
        "an entropy instead of a divergence from uniform",
    ),
    Fault(
        "the temperature's batch",
        "falcon_fast/objective/temperature.py",
        "f / (math.sqrt(n) * odds)",
        "f / (n * odds)",
        "tests/objective/test_temperature.py::test_published_value",
        "a sharper softmax than the published one",
    ),
    Fault(
        "Sylvester's sign",
        "falcon_fast/objective/codes.py",
        "torch.cat([hadamard, -hadamard], 1)",
        "torch.cat([hadamard, hadamard], 1)",
        "tests/objective/test_codes.py::test_hadamard_is_exactly_tight_and_orthogonal_inside_a_block",
        "equal codes",
    ),
    Fault(
        "the stream of signs",
        "falcon_fast/objective/codes.py",
        "raw >> np.uint64(32)",
        "raw >> np.uint64(31)",
        "tests/objective/test_codes.py::test_the_stream_never_changes",
        "another dictionary for the same seed",
    ),
    Fault(
        "the probe trains the backbone",
        "falcon_fast/training/step.py",
        "learner.probe(features.detach().float())",
        "learner.probe(features.float())",
        "tests/training/test_step.py::test_the_probe_learns_and_leaves_the_network_alone",
        "labels reach the representation",
    ),
    Fault(
        "the sum over micro-batches",
        "falcon_fast/training/step.py",
        "total if learner.accumulate == 1 else total / learner.accumulate",
        "total",
        "tests/training/test_step.py::test_micro_batches_have_the_mean_of_their_gradients",
        "a rate that grows with accumulation",
    ),
    Fault(
        "the cosine upside down",
        "falcon_fast/training/optimizer.py",
        "(1.0 + math.cos(math.pi * min(1.0, progress)))",
        "(1.0 - math.cos(math.pi * min(1.0, progress)))",
        "tests/training/test_optimizer.py::test_warm_up_then_half_cosine",
        "the learning rate ends at its peak",
    ),
    Fault(
        "AdamW decays like Adam",
        "falcon_fast/training/optimizer.py",
        "return torch.optim.AdamW(groups",
        "return torch.optim.Adam(groups",
        "tests/training/test_optimizer.py::test_adam_decays_like_l2_and_adamw_decoupled",
        "weight decay that the moments rescale",
    ),
    Fault(
        "the average's decay",
        "falcon_fast/training/averaging.py",
        "torch.full((), 1 - self.decay,",
        "torch.full((), self.decay,",
        "tests/training/test_averaging.py::test_it_is_timms_average",
        "an average that forgets at once",
    ),
    Fault(
        "statistics of a bad batch",
        "falcon_fast/training/step.py",
        "    statistics.put_back_if(skipped)\n",
        "",
        "tests/training/test_skipping.py::test_a_bad_step_leaves_no_trace",
        "running statistics that are NaN for good",
    ),
    Fault(
        "an average that takes part in a skipped step",
        "falcon_fast/training/step.py",
        "learner.average.update(skipped)",
        "learner.average.update()",
        "tests/training/test_skipping.py::test_a_bad_step_leaves_no_trace",
        "an average that moves without a step",
    ),
    Fault(
        "a bad step of one process",
        "falcon_fast/training/skipping.py",
        "    if group is not None:\n        dist.all_reduce(found, dist.ReduceOp.MAX, group=group)\n",
        "",
        "tests/training/test_step.py::test_what_one_process_alone_knows_of_a_step_decides_for_all",
        "processes whose weights differ",
    ),
    Fault(
        "a checkpoint of ruined weights",
        "falcon_fast/training/session.py",
        "        self._check_finite(step, tensors)\n",
        "",
        "tests/training/test_bad_steps.py::test_weights_that_overflow_are_not_saved",
        "weights in a checkpoint that are not finite",
    ),
    Fault(
        "one checkpoint too many",
        "falcon_fast/training/checkpoints/saver.py",
        "complete(self._directory)[: -self._keep]",
        "complete(self._directory)[: -self._keep - 1]",
        "tests/training/checkpoints/test_saver.py::test_only_the_newest_stay_and_latest_is_the_newest",
        "a disk that fills up",
    ),
    Fault(
        "the oldest checkpoint",
        "falcon_fast/training/checkpoints/checkpoint.py",
        "    return found[-1]\n",
        "    return found[0]\n",
        "tests/training/checkpoints/test_saver.py::test_only_the_newest_stay_and_latest_is_the_newest",
        "a run that resumes at an older step",
    ),
    Fault(
        "crops never touch the lower border",
        "falcon_fast/data/views/sampling.py",
        "uniform[:, 2 * CROP_TRIES] * (free_height + 1)",
        "uniform[:, 2 * CROP_TRIES] * free_height",
        "tests/data/views/test_sampling.py::test_crop_boxes_are_the_rule",
        "one place of a crop is never taken",
    ),
)

RESUMING = (
    # ---- what a resumed run may change, and which of its files are used
    Fault(
        "the oldest whole checkpoint",
        "falcon_fast/training/checkpoints/selection.py",
        "reversed(candidates(run))",
        "candidates(run)",
        "tests/training/checkpoints/test_selection.py::test_the_newest_is_taken_where_nothing_is_wrong",
        "a run that loses its newest steps at each resume",
    ),
    Fault(
        "checkpoints sorted as text",
        "falcon_fast/training/checkpoints/checkpoint.py",
        "key=lambda path: int(path.name.removeprefix(PREFIX))",
        "key=lambda path: path.name",
        "tests/training/checkpoints/test_selection.py::test_ten_million_steps_come_after_one_million",
        "a long run that goes back to step 99,999,999",
    ),
    Fault(
        "shards are not verified",
        "falcon_fast/training/checkpoints/integrity.py",
        'if checksum(file) != said["crc32"]:',
        "if not checksum(file):",
        "tests/training/checkpoints/test_integrity.py::test_a_file_of_another_checkpoint_is_noticed",
        "weights of another step, in silence",
    ),
    Fault(
        "the file before the command",
        "falcon_fast/config/differences.py",
        "for other in (edited, asked):",
        "for other in (asked, edited):",
        "tests/config/test_differences.py::test_the_command_comes_before_the_file_and_the_file_before_the_checkpoint",
        "an option that does nothing",
    ),
    Fault(
        "every change is allowed",
        "falcon_fast/config/differences.py",
        "if change.rule is not OnResume.FREE and change.name not in allowed]",
        "if change.rule is OnResume.FIXED and change.name not in allowed]",
        "tests/config/test_differences.py::test_a_refusal_names_every_change_and_what_to_do",
        "another learning rate in the middle of a run, by mistake",
    ),
    Fault(
        "the last of two rows of a step",
        "falcon_fast/training/records/mending.py",
        "once.setdefault(step, row)",
        "once[step] = row",
        "tests/training/records/test_mending.py::test_the_first_of_two_rows_of_a_step_is_kept",
        "the later of two rows of one step",
    ),
    Fault(
        "names that two runs share",
        "falcon_fast/runs/directory.py",
        "            candidate.mkdir()\n",
        "            candidate.mkdir(exist_ok=True)\n",
        "tests/runs/test_directory.py::test_directories_that_are_made_at_once_get_names_of_their_own",
        "two runs of one second in one directory",
    ),
)

VIEWS_AND_FIGURES = (
    Fault(
        "curves swapped",
        "falcon_fast/evaluation/report.py",
        'curve(losses, "prior", "prior", linewidth=1)',
        'curve(losses, "invariance", "prior", linewidth=1)',
        "tests/evaluation/test_report.py::test_every_curve_is_its_own_column",
        "a curve under the label of another",
    ),
    Fault(
        "a curve's label",
        "falcon_fast/evaluation/report.py",
        'curve(codes, "codes_used", "in a batch", linewidth=1)',
        'curve(codes, "codes_used", "on the test split", linewidth=1)',
        "tests/evaluation/test_report.py::test_every_curve_is_its_own_column",
        "two curves with the same label",
    ),
    Fault(
        "probe and kNN",
        "falcon_fast/evaluation/report.py",
        '_figure(row["probe"]), _figure(row["knn"])',
        '_figure(row["knn"]), _figure(row["probe"])',
        "tests/evaluation/test_report.py::test_every_figure_stands_in_its_column",
        "two columns of the table swapped",
    ),
    Fault(
        "grayscale from the column of the jitter's order",
        "falcon_fast/data/views/sampling.py",
        "gray=uniform[:, 6] <",
        "gray=uniform[:, 5] <",
        "tests/data/views/test_sampling.py::test_every_choice_reads_a_column_of_its_own",
        "two choices that should be independent",
    ),
    Fault(
        "the line of the representation check",
        "falcon_fast/evaluation/collapse.py",
        "MIN_ENERGY_SHARE = 0.02\n",
        "MIN_ENERGY_SHARE = 0.005\n",
        "tests/evaluation/test_collapse.py::test_either_side_of_the_published_lines",
        "vectors that only rounding tells apart pass",
    ),
)

FAULTS = (*RESUMING, *REPORTING, *CORE, *VIEWS_AND_FIGURES)
