"""Every fault that is tried, what must come of it, and the tests that show it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Fault:
    """`tests`: pytest's names, with or without parameters; all must pass."""

    name: str
    expected: str
    tests: tuple[str, ...]


_INJECTED = "tests/faults/test_injected.py::"
_CLIENTS = "tests/faults/test_clients.py::"
_RESOURCES = "tests/faults/test_resources.py::"
_FILES = "tests/faults/test_files.py::"
_LAUNCHER = "tests/serve/test_launcher.py::"
_SERVER = "tests/serve/test_triton_server.py::"
_LIFECYCLE = "tests/triton/test_lifecycle.py::"
_CANCELLATION = "tests/triton/test_cancellation.py::"
_QUEUEING = "tests/triton/test_queueing.py::"
_THREAD = "tests/engine/test_engine_thread.py::"
_LOADER = "tests/models/test_loader.py::"
_ONE_FAILS = f"{_INJECTED}test_one_request_fails_alone"

FAULTS = (
    # Processes.
    Fault(
        "tritonserver, its guard or the model's process is killed (-9)",
        "the others end, shared memory is removed",
        (f"{_SERVER}test_a_killed_process_takes_the_others_with_it",),
    ),
    Fault(
        "the model's process is killed under `make serve`",
        "the command ends with an error",
        (f"{_LAUNCHER}test_a_killed_model_process_ends_the_command_with_an_error",),
    ),
    Fault(
        "tritonserver dies under `make serve`",
        "the command ends with an error",
        (f"{_LAUNCHER}test_a_server_that_dies_ends_the_command_with_an_error",),
    ),
    Fault(
        "the launcher is killed (-9)",
        "the server does not outlive it; the next start clears up",
        (
            f"{_SERVER}test_the_server_does_not_outlive_a_killed_parent",
            f"{_LAUNCHER}test_what_a_killed_launcher_left_behind_is_removed_by_the_next",
        ),
    ),
    Fault(
        "the model's process is stopped (SIGSTOP) for two seconds",
        "every stream goes on where it was",
        (f"{_CLIENTS}test_a_stopped_process_goes_on_where_it_was",),
    ),
    Fault(
        "the model's process is killed (-9) or crashes (SEGV) under a bare tritonserver, with streams open",
        "new requests are refused; the streams end at their clients' deadlines; nothing is left when the server ends",
        (f"{_RESOURCES}test_what_clients_see_of_a_crash_without_the_launcher",),
    ),
    Fault("SIGTERM while loading", "nothing is left", (f"{_LAUNCHER}test_a_signal_while_loading_leaves_nothing",)),
    Fault(
        "SIGTERM, SIGINT, SIGHUP while serving",
        "server and model end, nothing is left",
        (f"{_LAUNCHER}test_a_signal_stops_server_and_stub_and_leaves_nothing",),
    ),
    Fault(
        "SIGTERM with open requests",
        "they finish within the grace, or end with an error",
        (
            f"{_LIFECYCLE}test_stopping_the_server_lets_open_streams_finish",
            f"{_LAUNCHER}test_ctrl_c_ends_a_real_answer_with_an_error_and_leaves_nothing",
            f"{_THREAD}test_draining_ends_what_outlasts_its_patience",
        ),
    ),
    Fault(
        "SIGTERM again and again while draining",
        "open streams end with an error that says so, nothing is left",
        (f"{_RESOURCES}test_a_second_signal_while_draining_changes_nothing",),
    ),
    Fault(
        "SIGTERM with an idle gRPC stream open",
        "the server ends within its patience",
        (f"{_LIFECYCLE}test_stopping_with_an_idle_stream_open_leaves_nothing",),
    ),
    # Clients.
    Fault("a gRPC stream is cancelled", "blocks back, one final", (f"{_CANCELLATION}test_cancelling_a_grpc_stream",)),
    Fault("an HTTP connection is closed", "blocks back at once", (f"{_CANCELLATION}test_closing_an_http_connection",)),
    Fault(
        "a queued request's client goes", "it leaves the queue", (f"{_CANCELLATION}test_cancelling_a_queued_request",)
    ),
    Fault(
        "a client goes in the middle of its prompt",
        "blocks back at once",
        (f"{_CANCELLATION}test_cancelling_in_the_middle_of_a_prompt",),
    ),
    Fault(
        "a preempted request's client goes",
        "blocks and host blocks back",
        (f"{_CANCELLATION}test_cancelling_a_preempted_request",),
    ),
    Fault(
        "a client goes at about its last token",
        "one final, whichever comes first",
        (f"{_CANCELLATION}test_cancelling_at_about_the_last_token",),
    ),
    Fault("a storm of cancels", "all ended, all blocks back", (f"{_CANCELLATION}test_many_cancelled_at_once",)),
    Fault(
        "a client's process is killed (-9)", "noticed, blocks back", (f"{_CANCELLATION}test_a_killed_client_process",)
    ),
    Fault(
        "a client that does not read",
        "it finds the whole answer later; others are not held up",
        (f"{_CLIENTS}test_a_client_that_does_not_read_holds_nobody_up",),
    ),
    Fault(
        "10,000 requests at once",
        "each is answered, and the server holds no more than before",
        (f"{_CLIENTS}test_ten_thousand_requests_at_once",),
    ),
    Fault(
        "more requests than the queue takes",
        "UNAVAILABLE with the numbers, at once",
        (f"{_QUEUEING}test_a_full_queue_answers_unavailable_with_the_numbers",),
    ),
    # Inside the model.
    Fault("the tokenizer raises", "its request ends with an error, no other", (f"{_ONE_FAILS}[tokenizer]",)),
    Fault("no memory for a request", "its request ends with an error, no other", (f"{_ONE_FAILS}[memory]",)),
    Fault("the detokenizer raises", "its request ends with an error, no other", (f"{_ONE_FAILS}[detokenizer]",)),
    Fault("NaN logits in one row", "its request ends with an error, no other", (f"{_ONE_FAILS}[nan]",)),
    Fault(
        "a step raises",
        "its requests end with an error, no others",
        (
            f"{_INJECTED}test_a_failed_step_ends_its_requests_and_no_others[step]",
            f"{_INJECTED}test_over_http_a_fault_before_the_first_token_is_all_of_the_answer",
        ),
    ),
    Fault(
        "the sampler raises",
        "the step's requests end with an error",
        (f"{_INJECTED}test_a_failed_step_ends_its_requests_and_no_others[sampler]",),
    ),
    Fault(
        "two steps in a row raise, again and again",
        "the engine goes on",
        (f"{_INJECTED}test_two_failed_steps_in_a_row_are_not_three",),
    ),
    Fault(
        "three steps in a row raise",
        "every request is answered, the model's process ends, and the command with it",
        (
            f"{_LAUNCHER}test_a_dead_engine_answers_every_request_and_ends_the_command",
            f"{_THREAD}test_a_dying_engine_answers_everyone_and_reports_it",
        ),
    ),
    Fault(
        "a step hangs",
        "deadlines are kept; shutting down does not wait for it",
        (
            f"{_INJECTED}test_a_deadline_is_kept_while_a_step_hangs",
            f"{_THREAD}test_deadlines_are_kept_while_the_engine_hangs_and_the_blocks_come_back_after_it",
            f"{_THREAD}test_shutdown_does_not_wait_for_a_step_that_never_ends",
        ),
    ),
    Fault(
        "the block manager refuses every 2nd, 3rd, 7th call",
        "the same tokens, later",
        (f"{_INJECTED}test_a_block_manager_that_finds_no_room_now_and_then_costs_time_only",),
    ),
    Fault(
        "a swap fails half way",
        "the step's requests end with an error; none goes on with another's K/V",
        (f"{_INJECTED}test_a_swap_that_fails_half_way_ends_the_requests_of_its_step",),
    ),
    Fault("the wall clock jumps", "nothing ends", (f"{_INJECTED}test_a_wall_clock_that_jumps_ends_nothing",)),
    Fault(
        "a response cannot be sent",
        "its request ends, no other",
        ("tests/triton/test_responses.py::test_a_failed_send_ends_its_request_only",),
    ),
    Fault(
        "a chat template that does not end, or does what it must not",
        "its request ends with an error",
        (
            "tests/test_chat_template.py::test_a_template_that_does_not_end_is_stopped",
            "tests/test_chat_template.py::test_what_a_template_must_not_do_fails_its_request",
        ),
    ),
    # Files and configuration.
    Fault(
        "truncated or broken safetensors", "refused by name", (f"{_LOADER}test_truncated_and_broken_files_are_named",)
    ),
    Fault(
        "tensors missing, unknown or of the wrong shape",
        "refused by name",
        (f"{_LOADER}test_missing_unknown_and_misshapen_tensors_are_named",),
    ),
    Fault(
        "an index of weights that leads out of its folder",
        "refused by name",
        (f"{_LOADER}test_an_index_names_files_of_its_folder_only",),
    ),
    Fault(
        "code in a model folder",
        "refused, never run",
        ("tests/test_security.py::test_code_from_a_model_folder_is_refused",),
    ),
    Fault(
        "a broken tokenizer",
        "refused by name",
        ("tests/test_text.py::test_a_broken_tokenizer_config_is_refused_by_name",),
    ),
    Fault(
        "wrong config.pbtxt or model.json",
        "the model does not load, and says why",
        (
            f"{_LIFECYCLE}test_a_model_that_cannot_be_served_fails_to_load",
            f"{_LAUNCHER}test_a_broken_model_json_is_refused",
        ),
    ),
    Fault(
        "metrics switched off",
        "not a line is shown, requests are served",
        (f"{_LIFECYCLE}test_without_metrics_not_a_line_is_shown",),
    ),
    Fault(
        "forged safetensors: lengths, offsets, shapes, dtypes, nesting",
        "refused by name",
        (
            f"{_FILES}test_forged_safetensors_are_refused_by_name",
            f"{_FILES}test_a_checkpoint_of_integers_is_refused_by_name",
        ),
    ),
    Fault(
        "truncated or forged tokenizer.json",
        "refused by name",
        (f"{_FILES}test_forged_tokenizers_are_refused_by_name",),
    ),
    Fault(
        "a full disk under the log",
        "requests are served",
        (f"{_RESOURCES}test_a_log_that_cannot_be_written_is_not_needed",),
    ),
    Fault(
        "standard output is closed",
        "requests are served",
        (f"{_RESOURCES}test_a_closed_standard_output_is_not_needed",),
    ),
    Fault(
        "the server is at its limit of open files",
        "new connections wait or are refused, running requests go on",
        (f"{_RESOURCES}test_at_the_limit_of_open_files_running_requests_go_on",),
    ),
    Fault(
        "/dev/shm is full",
        "a request that does not fit is refused, others are served",
        (f"{_RESOURCES}test_a_full_dev_shm_fails_what_does_not_fit_and_nothing_else",),
    ),
    Fault(
        "/dev/shm is full when a large answer is to be sent",
        "the request ends with an error, others are served",
        (f"{_RESOURCES}test_a_last_response_that_does_not_fit_dev_shm_ends_with_an_error",),
    ),
    Fault(
        "handing a request to the engine raises",
        "the request ends with an error, which is logged and counted",
        (f"{_INJECTED}test_a_request_lost_before_the_engine_is_logged_and_counted",),
    ),
    Fault(
        "a call to a metric raises",
        "the next export makes up for it",
        (f"{_INJECTED}test_a_metric_that_fails_is_made_up_for",),
    ),
    Fault("the disk is full", "said in one line", (f"{_LAUNCHER}test_a_full_disk_is_said_in_one_line",)),
    Fault(
        "a port is taken",
        "said before anything is loaded",
        (f"{_LAUNCHER}test_a_taken_port_is_named_before_anything_is_loaded",),
    ),
    Fault(
        "loading and unloading while requests come",
        "each is answered, by the old engine or the new one, or told that there is none",
        (
            f"{_LIFECYCLE}test_loading_and_unloading_while_requests_come",
            f"{_LIFECYCLE}test_streams_outlast_the_loading_of_other_arguments",
        ),
    ),
    Fault(
        "any of the above at any step, in simulation",
        "blocks, rows and answers come out even",
        ("tests/simulation/test_simulation.py::test_seeds_are_clean_and_go_through_what_is_to_be_tested",),
    ),
)
