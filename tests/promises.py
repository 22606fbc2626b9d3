"""What is promised, the tests that hold it, and for each promise a way to break the code that a test must catch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Mutant:
    """A fault: in `file` (from the project's root) `wrong` in place of `right`; the test `caught_by` fails of it."""

    file: str
    right: str
    wrong: str
    caught_by: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Promise:
    """A row of docs/promises.md. Tests are named from this folder, as `folder/file.py::test`."""

    text: str
    tests: tuple[str, ...]
    mutants: tuple[Mutant, ...]


PROMISES: dict[str, Promise] = {
    "acknowledged": Promise(
        text="An acknowledged write survives SIGKILL",
        tests=(
            "store/test_journal.py::test_what_sync_covers_is_in_the_file",
            "store/test_journal.py::test_nothing_acknowledged_is_lost_when_the_writer_is_killed",
            "store/test_power_loss.py::test_nothing_acknowledged_is_lost_at_200_points_of_death",
            "app/test_owner_kills.py::test_five_kills_at_any_moment_lose_nothing_and_leave_nobody",
        ),
        mutants=(
            Mutant(
                file="vespera_exec/store/journal.py",
                right="        return await future\n\n    async def perform",
                wrong="        return self._head\n\n    async def perform",
                caught_by="store/test_journal.py::test_nothing_acknowledged_is_lost_when_the_writer_is_killed",
            ),
        ),
    ),
    "power_loss": Promise(
        text="An acknowledged write survives a power loss where storage honours fsync",
        tests=(
            "store/test_journal.py::test_every_commit_reaches_the_disk_before_it_is_acknowledged",
            "store/test_power_loss.py::test_a_power_loss_takes_nothing_that_was_acknowledged",
        ),
        mutants=(
            Mutant(
                file="vespera_exec/store/database.py",
                right="PRAGMA synchronous = FULL",
                wrong="PRAGMA synchronous = NORMAL",
                caught_by="store/test_journal.py::test_every_commit_reaches_the_disk_before_it_is_acknowledged",
            ),
        ),
    ),
    "disk_full": Promise(
        text="On a full disk a write is refused by name, reads go on, and it resumes when there is room",
        tests=(
            "store/test_full_disk.py::test_what_was_refused_for_want_of_room_is_there_once_there_is_room",
            "store/test_full_disk.py::test_forty_times_full_loses_nothing",
            "store/test_full_disk.py::test_files_that_cannot_grow_lose_nothing_either",
        ),
        mutants=(
            Mutant(
                file="vespera_exec/store/journal.py",
                right="                self._obstructed(fault)\n",
                wrong="                self._obstructed(fault)\n                group = []\n",
                caught_by="store/test_full_disk.py::test_what_was_refused_for_want_of_room_is_there_once_there_is_room",
            ),
        ),
    ),
    "many_clients": Promise(
        text="Many clients share one data directory: one daemon, no busy error",
        tests=(
            "server/test_many_clients.py::test_four_bridges_and_four_commands_on_a_fresh_directory_share_one_daemon",
            "server/test_many_clients.py::test_four_bridges_outlive_a_killed_daemon_with_all_tasks_there",
            "server/test_launch.py::test_many_starters_at_once_end_with_exactly_one_daemon",
        ),
        mutants=(
            Mutant(
                file="vespera_exec/server/launch.py",
                right="fcntl.flock(turn, fcntl.LOCK_EX | fcntl.LOCK_NB)",
                wrong="fcntl.flock(turn, fcntl.LOCK_SH | fcntl.LOCK_NB)",
                caught_by="server/test_launch.py::test_many_starters_at_once_end_with_exactly_one_daemon",
            ),
        ),
    ),
    "damage": Promise(
        text="Damage is found: after an unclean exit, in the background, and when an event is read",
        tests=(
            "store/test_journal.py::test_damage_is_looked_for_after_an_unclean_exit",
            "store/test_damage.py::test_a_flipped_bit_is_found_and_crashes_nobody",
            "store/test_damage.py::test_an_event_that_does_not_match_its_checksum_is_given_to_nobody",
            "store/test_progress_rows.py::test_progress_is_not_folded_from_a_damaged_log",
            "store/test_upkeep.py::test_damage_that_no_open_noticed_is_logged",
        ),
        mutants=(
            Mutant(
                file="vespera_exec/store/reading.py",
                right="if zlib.crc32(body) != int(checksum):",
                wrong="if not checksum:",
                caught_by="store/test_progress_rows.py::test_progress_is_not_folded_from_a_damaged_log",
            ),
            Mutant(
                file="vespera_exec/store/reading.py",
                right="if not isinstance(body, bytes) or zlib.crc32(body) != checksum:",
                wrong="if not isinstance(body, bytes):",
                caught_by="store/test_damage.py::test_an_event_that_does_not_match_its_checksum_is_given_to_nobody",
            ),
            Mutant(
                file="vespera_exec/store/damage.py",
                right="if not isinstance(body, bytes) or zlib.crc32(body) != checksum:",
                wrong="if not isinstance(body, bytes):",
                caught_by="store/test_upkeep.py::test_damage_that_no_open_noticed_is_logged",
            ),
        ),
    ),
    "backup": Promise(
        text="A backup under writes has all that was acknowledged before it",
        tests=(
            "store/test_backup.py::test_a_backup_under_load_has_all_that_was_acknowledged_before",
            "store/test_backup.py::test_damage_is_not_copied_over_a_good_backup",
        ),
        mutants=(
            Mutant(
                file="vespera_exec/store/backup.py",
                right="_or_named(lambda: reader.backup(copy, pages=_STEP_PAGES, progress=step), part.name)",
                wrong="shutil.copyfile(source, part)",
                caught_by="store/test_backup.py::test_a_backup_under_load_has_all_that_was_acknowledged_before",
            ),
        ),
    ),
    "dead_owner": Promise(
        text="What a dead owner left running is found and named: INTERRUPTED, or resumed from its checkpoint",
        tests=(
            "app/test_owner_kills.py::test_five_kills_at_any_moment_lose_nothing_and_leave_nobody",
            "app/test_owner_kills.py::test_two_hundred_kills_at_any_moment_lose_nothing_and_leave_nobody",
            "app/test_recovery.py::test_a_role_that_resumes_goes_on_from_its_last_checkpoint_in_the_same_session",
            "app/test_recovery.py::test_a_role_that_does_not_resume_ends_interrupted_and_names_its_owner",
        ),
        mutants=(
            Mutant(
                file="vespera_exec/app/recovery.py",
                right='if life.status is not S.PENDING and role.on_interrupt != "resume":',
                wrong="if life.status is not S.PENDING:",
                caught_by="app/test_recovery.py::"
                "test_a_role_that_resumes_goes_on_from_its_last_checkpoint_in_the_same_session",
            ),
            Mutant(
                file="vespera_exec/app/recovery.py",
                right='if life.status is not S.PENDING and role.on_interrupt != "resume":',
                wrong="if False:",
                caught_by="app/test_recovery.py::test_a_role_that_does_not_resume_ends_interrupted_and_names_its_owner",
            ),
        ),
    ),
    "answers": Promise(
        text="An answer that was acknowledged survives SIGKILL, is taken once, and its work goes on",
        tests=(
            "app/test_answer_kills.py::test_an_answer_that_was_acknowledged_at_the_moment_of_death_is_kept",
            "app/test_answer_kills.py::test_whenever_the_owner_is_killed_no_answer_is_lost_or_taken_twice",
            "app/test_answer_kills.py::test_at_a_hundred_moments_of_death_no_answer_is_lost_or_taken_twice",
            "app/test_answers_of_people.py::test_a_question_outlives_any_number_of_owners",
            "app/test_answers_of_people.py::test_an_answered_run_that_waits_for_its_turn_goes_on_under_the_next_owner",
        ),
        mutants=(
            Mutant(
                file="vespera_exec/app/inputs.py",
                right="        await self._store.journal.sync()\n        life = session.lifecycle\n",
                wrong="        life = session.lifecycle\n",
                caught_by="app/test_answer_kills.py::"
                "test_an_answer_that_was_acknowledged_at_the_moment_of_death_is_kept",
            ),
            Mutant(
                file="vespera_exec/app/recovery.py",
                right="        if life.is_parked:\n",
                wrong="        if life.is_parked and life.open_inputs:\n",
                caught_by="app/test_answers_of_people.py::"
                "test_an_answered_run_that_waits_for_its_turn_goes_on_under_the_next_owner",
            ),
            Mutant(
                file="vespera_exec/app/recovery.py",
                right="        if life.is_parked:\n",
                wrong="        if False:\n",
                caught_by="app/test_answers_of_people.py::test_a_question_outlives_any_number_of_owners",
            ),
        ),
    ),
    "workers": Promise(
        text="A task is one worker's at a time, and outlives this worker and the server",
        tests=(
            "app/test_workers.py::test_many_tasks_are_claimed_by_eight_workers_each_exactly_once",
            "app/test_workers.py::test_what_a_worker_is_answered_is_on_disk_by_then",
            "app/test_workers.py::test_when_reports_stop_the_next_worker_goes_on_and_the_lost_one_is_refused",
            "app/test_workers_over_owners.py::test_a_worker_keeps_its_lease_under_the_next_owner_and_no_recovery_is_burnt",
            "server/test_worker_tools.py::test_a_worker_goes_on_after_the_daemon_was_killed_as_if_nothing_had_happened",
        ),
        mutants=(
            Mutant(
                file="vespera_exec/app/workers/workers.py",
                right="        await self._store.journal.sync()\n        return claimed[0]",
                wrong="        return claimed[0]",
                caught_by="app/test_workers.py::test_what_a_worker_is_answered_is_on_disk_by_then",
            ),
            Mutant(
                file="vespera_exec/model/leases.py",
                right="return principal == self.principal and hmac.compare_digest(digest_of(key), self.digest)",
                wrong="return principal == self.principal",
                caught_by="app/test_workers.py::"
                "test_when_reports_stop_the_next_worker_goes_on_and_the_lost_one_is_refused",
            ),
            Mutant(
                file="vespera_exec/app/recovery.py",
                right='            if began and not (role.runner == "external" and life.lease is not None):',
                wrong="            if began:",
                caught_by="app/test_workers_over_owners.py::"
                "test_a_worker_keeps_its_lease_under_the_next_owner_and_no_recovery_is_burnt",
            ),
        ),
    ),
    "plans": Promise(
        text="Each step of a plan is done once and in its turn, whoever dies",
        tests=(
            "app/test_plan_chaos.py::test_however_often_the_owner_is_killed_each_step_is_done_once_and_in_its_turn",
            "app/test_plan_chaos.py::test_a_real_daemon_is_killed_and_its_plans_come_to_their_ends",
            "app/test_plan_chaos.py::test_sixty_rounds_of_ten_kills",
            "app/test_plan_chaos.py::test_twenty_rounds_of_six_daemons",
            "app/test_plan_recovery.py::test_what_has_ended_is_not_done_again_and_what_runs_goes_on",
        ),
        mutants=(
            Mutant(
                file="vespera_exec/model/plans/board.py",
                right="if (part := board._steps.get(each.step_id)) is not None:",
                wrong="if (part := board._steps.get(each.step_id)) is not None and not each.status.is_terminal:",
                caught_by="app/test_plan_recovery.py::test_what_has_ended_is_not_done_again_and_what_runs_goes_on",
            ),
            Mutant(
                file="vespera_exec/model/plans/schedule.py",
                right="sum(not _lets_on(known[each]) for each in needs)",
                wrong="min(1, sum(not _lets_on(known[each]) for each in needs))",
                caught_by="app/test_plan_chaos.py::"
                "test_however_often_the_owner_is_killed_each_step_is_done_once_and_in_its_turn",
            ),
        ),
    ),
    "capacity": Promise(
        text="Capacity is never exceeded and all of it comes back, also after a SIGKILL",
        tests=(
            "app/test_capacity.py::test_one_waits_for_the_gpu_of_another_and_what_needs_none_passes_it",
            "app/test_capacity.py::test_it_is_given_back_before_the_end_is_seen_and_the_log_says_what_it_cost",
            "app/test_capacity.py::test_failure_cancel_and_timeout_give_it_back_too",
            "app/test_capacity.py::test_a_worker_gets_only_what_there_is_capacity_for",
            "app/test_capacity.py::test_after_a_kill_the_next_owner_has_all_of_it_and_whoever_waited_gets_it",
            "app/test_capacity_histories.py::test_no_log_ever_shows_more_in_use_than_there_is_and_all_comes_back",
            "engine/test_capacity_pools.py::test_never_more_than_there_is_never_a_part_and_all_of_it_comes_back",
            "engine/test_capacity_pools.py::test_a_stream_of_higher_priorities_starves_nobody",
        ),
        mutants=(
            Mutant(
                file="vespera_exec/engine/capacity/pools.py",
                right="if free[each.pool.id] >= amount]",
                wrong="if each.total >= amount]",
                caught_by="engine/test_capacity_pools.py"
                "::test_never_more_than_there_is_never_a_part_and_all_of_it_comes_back",
            ),
            Mutant(
                file="vespera_exec/engine/capacity/pools.py",
                right="        if now - oldest.since > PATIENCE_SECONDS:",
                wrong="        if False:",
                caught_by="engine/test_capacity_pools.py::test_a_stream_of_higher_priorities_starves_nobody",
            ),
            Mutant(
                file="vespera_exec/engine/engine.py",
                right="                self.grants.give_back(job)\n",
                wrong="",
                caught_by="app/test_capacity.py::test_failure_cancel_and_timeout_give_it_back_too",
            ),
            Mutant(
                file="vespera_exec/model/session.py",
                right="""if ends and life.capacity and self.release_capacity("It has ended"):""",
                wrong="if False:",
                caught_by="app/test_capacity.py"
                "::test_it_is_given_back_before_the_end_is_seen_and_the_log_says_what_it_cost",
            ),
            Mutant(
                file="vespera_exec/app/recovery.py",
                right="""session.release_capacity("Its owner ended", at=_last_sign(each))""",
                wrong="pass",
                caught_by="app/test_capacity.py"
                "::test_after_a_kill_the_next_owner_has_all_of_it_and_whoever_waited_gets_it",
            ),
        ),
    ),
    "nobody_left": Promise(
        text="After a cancel, a timeout or a kill of the daemon or the shim no descendant is left",
        tests=(
            "engine/test_nobody_left.py::test_nothing_is_left_of_a_tree_after_cancel",
            "engine/test_nobody_left.py::test_the_terminal_event_says_which_rung_ended_the_tree",
            "engine/test_nobody_left.py::test_nothing_is_left_of_a_tree_when_the_daemon_is_killed",
            "engine/test_nobody_left.py::test_nothing_is_left_of_a_tree_when_its_shim_is_killed",
        ),
        mutants=(
            Mutant(
                file="vespera_exec/engine/shim.py",
                right="    become_subreaper()  # a fork does not inherit it\n",
                wrong="",
                caught_by="engine/test_nobody_left.py::test_nothing_is_left_of_a_tree_after_cancel",
            ),
        ),
    ),
    "one_end": Promise(
        text="An execution has exactly one terminal transition, and no illegal one",
        tests=(
            "model/test_model_races.py::test_four_threads_that_end_a_session_end_it_once",
            "model/test_transitions.py::test_a_change_that_the_table_does_not_list_is_refused_and_changes_nothing",
            "store/test_journal.py::test_there_is_one_terminal_event_per_execution",
            "store/test_segments.py::test_an_execution_ends_once_in_whichever_segment",
            "store/test_migrations.py::test_what_ended_in_an_older_format_does_not_end_again",
        ),
        mutants=(
            Mutant(
                file="vespera_exec/store/writer.py",
                right="                    rows.ends.append((log.stream,))\n",
                wrong="                    pass\n",
                caught_by="store/test_segments.py::test_an_execution_ends_once_in_whichever_segment",
            ),
            Mutant(
                file="vespera_exec/model/session.py",
                right="        transitions.check(old, new, life.paused_from)\n",
                wrong="",
                caught_by="model/test_transitions.py::"
                "test_a_change_that_the_table_does_not_list_is_refused_and_changes_nothing",
            ),
        ),
    ),
    "slow_subscriber": Promise(
        text="A slow or dead subscriber blocks nobody, leaks nothing, and goes on from its cursor",
        tests=(
            "store/test_subscribers.py::test_the_living_hear_all_beside_the_dead_and_nothing_is_left_of_either",
            "store/test_subscribers.py::test_an_event_that_meets_a_cancelled_subscriber_still_reaches_the_others",
            "store/test_subscribers.py::test_a_hundred_dead_beside_nine_hundred_living_slow_no_writer_down",
        ),
        mutants=(
            Mutant(
                file="vespera_exec/store/feed.py",
                right="        for future in self.parked:\n            if not future.done():\n"
                "                future.set_result(None)\n",
                wrong="        for future in self.parked:\n            future.set_result(None)\n",
                caught_by="store/test_subscribers.py::"
                "test_an_event_that_meets_a_cancelled_subscriber_still_reaches_the_others",
            ),
            Mutant(
                file="vespera_exec/store/feed.py",
                right="            del self._topics[_key(task_id, execution_id)]\n",
                wrong="            pass\n",
                caught_by="store/test_subscribers.py::"
                "test_the_living_hear_all_beside_the_dead_and_nothing_is_left_of_either",
            ),
        ),
    ),
    "handle": Promise(
        text="An MCP task handle answers after SIGKILL, whatever its run was doing",
        tests=("server/test_mcp_tasks.py::test_after_a_sigkill_of_the_daemon_the_same_handles_answer",),
        mutants=(
            Mutant(
                file="vespera_exec/app/runs.py",
                right="        elif run_id.isascii() and len(run_id) <= _LONGEST_ID:\n",
                wrong="        elif False:\n",
                caught_by="server/test_mcp_tasks.py::test_after_a_sigkill_of_the_daemon_the_same_handles_answer",
            ),
        ),
    ),
    "reconnect": Promise(
        text="Who reconnects with a cursor hears everything once, over a killed daemon too",
        tests=(
            "server/test_reconnects.py::"
            "test_a_follower_cut_off_at_random_hears_everything_once_over_a_killed_daemon_too",
            "store/test_feed.py::test_history_that_memory_has_forgotten_comes_from_the_database",
            "store/test_feed.py::test_reconnecting_by_cursor_anywhere_loses_and_repeats_nothing",
            "server/test_http.py::test_a_stream_resumed_anywhere_has_no_gap_and_no_repeat",
            "server/test_reconnects.py::"
            "test_a_follower_of_a_run_that_asks_hears_question_and_answer_once_over_a_killed_daemon_too",
        ),
        mutants=(
            Mutant(
                file="vespera_exec/server/http/sse.py",
                right="    return int(last_event_id)\n",
                wrong="    return cursor\n",
                caught_by="server/test_reconnects.py::"
                "test_a_follower_cut_off_at_random_hears_everything_once_over_a_killed_daemon_too",
            ),
            Mutant(
                file="vespera_exec/store/feed.py",
                right="return known[:limit], known[limit - 1].cursor",
                wrong="return known[:limit], head",
                caught_by="store/test_feed.py::test_history_that_memory_has_forgotten_comes_from_the_database",
            ),
            Mutant(
                file="vespera_exec/store/feed.py",
                right="return topic.tail[bisect_right(topic.tail, after, key=_cursor_of) :]",
                wrong="return topic.tail[bisect_right(topic.tail, after - 1, key=_cursor_of) :]",
                caught_by="store/test_feed.py::test_reconnecting_by_cursor_anywhere_loses_and_repeats_nothing",
            ),
        ),
    ),
    "clock": Promise(
        text="Clock jumps and suspends corrupt no duration and expire no owner",
        tests=(
            "model/test_clock_jumps.py::test_no_jump_and_no_sleep_is_in_a_duration",
            "model/test_clock_jumps.py::test_a_clock_that_is_driven_alone_is_moved_by_no_jump_either",
            "engine/test_wall_clock.py::test_a_timeout_comes_in_its_time",
            "store/test_owner_stamps.py::test_an_owner_whose_stamp_is_off_and_that_sleeps_is_still_the_owner",
        ),
        mutants=(
            Mutant(
                file="vespera_exec/model/timing.py",
                right="            return self._paused_since is not None\n",
                wrong="            return (self.paused_at or self.started_at) > (self.resumed_at or self.started_at)\n",
                caught_by="model/test_clock_jumps.py::test_a_clock_that_is_driven_alone_is_moved_by_no_jump_either",
            ),
            Mutant(
                file="vespera_exec/model/session.py",
                right="now = ledger.clock.monotonic()\n        noted = ",
                wrong="now = ledger.clock.now().timestamp()\n        noted = ",
                caught_by="model/test_clock_jumps.py::test_no_jump_and_no_sleep_is_in_a_duration",
            ),
            Mutant(
                file="vespera_exec/store/lock.py",
                right="fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)",
                wrong="fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)",
                caught_by="store/test_owner_stamps.py::"
                "test_an_owner_whose_stamp_is_off_and_that_sleeps_is_still_the_owner",
            ),
        ),
    ),
    "load": Promise(
        text="10,000 runs, 1,000 of them at once: each is acknowledged soon and ends once",
        tests=("app/test_load.py::test_a_crowd_of_runs_ends_completely_and_each_once",),
        mutants=(
            Mutant(
                file="vespera_exec/engine/engine.py",
                right="self._waiting.admitted(self._options.max_concurrent - len(self._slots))",
                wrong="self._waiting.admitted(self._options.max_concurrent + 1 - len(self._slots))",
                caught_by="app/test_load.py::test_a_crowd_of_runs_ends_completely_and_each_once",
            ),
        ),
    ),
    "no_leak": Promise(
        text="Runs leave no memory, descriptor, thread, task, process or file behind; the WAL stays small",
        tests=(
            "app/test_no_leak.py::test_three_hundred_runs_thirty_with_processes_leave_nothing_behind",
            "app/test_no_leak.py::test_ten_thousand_runs_leave_memory_descriptors_threads_and_wal_flat",
            "store/test_wal.py::test_the_wal_stays_under_64_mb_while_somebody_reads_on",
        ),
        mutants=(
            Mutant(
                file="vespera_exec/engine/running.py",
                right="        finally:\n            self._output.close()\n",
                wrong="        finally:\n            pass\n",
                caught_by="app/test_no_leak.py::test_three_hundred_runs_thirty_with_processes_leave_nothing_behind",
            ),
        ),
    ),
    "malformed": Promise(
        text="No malformed input crashes anything or gives a 500",
        tests=(
            "server/test_http.py::test_mutated_requests_never_end_in_a_500",
            "server/test_http.py::test_a_bad_body_is_a_400_that_says_why",
            "server/test_connections.py::test_garbage_is_answered_once_and_the_session_goes_on",
            "server/test_mcp_transports.py::test_garbage_over_http_is_refused_and_the_door_stays_open",
        ),
        mutants=(
            Mutant(
                file="vespera_exec/server/http/requests.py",
                right="    except ValueError as error:\n",
                wrong="    except LookupError as error:\n",
                caught_by="server/test_http.py::test_mutated_requests_never_end_in_a_500",
            ),
        ),
    ),
    "limits": Promise(
        text="Sizes, depths and characters have limits, on HTTP and stdio alike",
        tests=(
            "server/test_guard.py::test_a_body_of_exactly_the_limit_passes_and_one_byte_more_does_not",
            "server/test_guard.py::test_a_body_without_a_declared_length_is_counted",
            "server/test_connections.py::test_a_line_of_exactly_the_limit_and_lines_in_pieces_are_read",
            "server/test_http.py::test_a_bad_body_is_a_400_that_says_why",
        ),
        mutants=(
            Mutant(
                file="vespera_exec/server/http/guard.py",
                right="            if size > self._body_limit:\n",
                wrong="            if False:\n",
                caught_by="server/test_guard.py::test_a_body_without_a_declared_length_is_counted",
            ),
            Mutant(
                file="vespera_exec/app/checks.py",
                right='    if "\\0" in text:\n',
                wrong="    if False:\n",
                caught_by="server/test_http.py::test_a_bad_body_is_a_400_that_says_why",
            ),
        ),
    ),
    "role_files": Promise(
        text="Role files are bounded data, and a role's name is never a path",
        tests=(
            "roles/test_role_files.py::test_bombs_are_refused_at_once",
            "roles/test_role_files.py::test_fault_is_told_with_file_and_line",
            "roles/test_role_files.py::test_thousand_hostile_names_are_refused",
            "roles/test_role_files.py::test_random_bytes_never_escape_as_another_error",
        ),
        mutants=(
            Mutant(
                file="roles/definition.py",
                right='re.compile(r"[a-z][a-z0-9_-]{0,63}\\Z")',
                wrong='re.compile(r"[a-z][a-z0-9_-]{0,63}$")',
                caught_by="roles/test_role_files.py::test_thousand_hostile_names_are_refused",
            ),
            Mutant(
                file="roles/yamlfile.py",
                right="                    if depth > MAX_DEPTH:\n",
                wrong="                    if False:\n",
                caught_by="roles/test_role_files.py::test_fault_is_told_with_file_and_line",
            ),
            Mutant(
                file="roles/yamlfile.py",
                right='if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):',
                wrong="if False:",
                caught_by="roles/test_role_files.py::test_fault_is_told_with_file_and_line",
            ),
        ),
    ),
    "tcp_denies": Promise(
        text="Every TCP route denies: no token, wrong Host, wrong Origin, a body that is no JSON",
        tests=(
            "server/test_http.py::test_every_tcp_route_denies",
            "server/test_guard.py::test_a_websocket_is_guarded_like_everything_else",
            "server/test_mcp_transports.py::test_no_transport_opens_without_the_token",
            "server/test_daemon.py::test_nobody_comes_in_over_tcp_without_the_token",
        ),
        mutants=(
            Mutant(
                file="vespera_exec/server/http/guard.py",
                right="        if hmac.compare_digest(given, self.token.encode()):\n",
                wrong="        if given:\n",
                caught_by="server/test_http.py::test_every_tcp_route_denies",
            ),
            Mutant(
                file="vespera_exec/server/http/guard.py",
                right="        if host is None or host.lower() not in names:\n",
                wrong="        if host is None:\n",
                caught_by="server/test_http.py::test_every_tcp_route_denies",
            ),
            Mutant(
                file="vespera_exec/server/http/guard.py",
                right="        if origins and not (",
                wrong="        if False and not (",
                caught_by="server/test_http.py::test_every_tcp_route_denies",
            ),
        ),
    ),
    "isolation": Promise(
        text="Of what another principal has made nobody learns anything, at any door",
        tests=(
            "server/test_isolation.py::test_every_route_stands_in_the_table",
            "server/test_isolation.py::test_every_tool_stands_in_the_table",
            "server/test_isolation.py::test_every_resource_and_prompt_stands_in_the_table",
            "server/test_isolation.py::test_no_route_tells_a_strangers_task_from_one_that_does_not_exist",
            "server/test_isolation.py::test_no_stream_opens_on_a_strangers_task",
            "server/test_isolation.py::test_no_list_shows_what_a_stranger_has_made",
            "server/test_isolation.py::test_no_tool_tells_a_strangers_task_from_one_that_does_not_exist",
            "server/test_isolation.py::test_no_resource_and_no_prompt_shows_a_strangers_task",
            "server/test_isolation.py::test_no_completion_offers_a_strangers_task",
            "server/test_isolation.py::test_no_task_handle_of_a_stranger_can_be_used",
            "server/test_isolation.py::test_no_subscription_hears_of_a_strangers_task",
        ),
        mutants=(
            Mutant(
                file="vespera_exec/app/tasks.py",
                right="(task := self._known.get(any_id)) and caller.sees(task.record.principal) and _is_whole(task):\n",
                wrong="(task := self._known.get(any_id)) and _is_whole(task):\n",
                caught_by="server/test_isolation.py::test_no_route_tells_a_strangers_task_from_one_that_does_not_exist",
            ),
            Mutant(
                file="vespera_exec/app/tasks.py",
                right="locate(beginning, principal=caller.sees_only)",
                wrong="locate(beginning)",
                caught_by="server/test_isolation.py::test_no_route_tells_a_strangers_task_from_one_that_does_not_exist",
            ),
            Mutant(
                file="vespera_exec/app/access.py",
                right="            sees_only=token.principal,\n",
                wrong="",
                caught_by="server/test_isolation.py::test_no_list_shows_what_a_stranger_has_made",
            ),
        ),
    ),
    "revoked": Promise(
        text="A token that is revoked or over ends within a second, with all that is open for it",
        tests=(
            "server/test_tokens.py::test_a_revoked_token_ends_its_event_stream",
            "server/test_tokens.py::test_a_revoked_token_ends_its_long_poll",
            "server/test_tokens.py::test_a_token_whose_time_is_over_ends_its_streams_too",
            "server/test_tokens.py::test_a_revoked_token_ends_its_mcp_call_and_its_session",
            "server/test_tokens.py::test_a_revoked_token_ends_its_sse_session",
            "server/test_tokens.py::test_a_new_token_of_the_name_does_not_get_the_old_session",
            "app/test_access.py::test_a_revoked_token_is_refused_though_the_disk_takes_nothing",
        ),
        mutants=(
            Mutant(
                file="vespera_exec/app/access.py",
                right="        for scope in tuple(known.open):\n            scope.cancel()\n",
                wrong="",
                caught_by="server/test_tokens.py::test_a_revoked_token_ends_its_event_stream",
            ),
            Mutant(
                file="vespera_exec/server/mcp/http.py",
                right="subject=caller.token, ",
                wrong="",
                caught_by="server/test_tokens.py::test_a_new_token_of_the_name_does_not_get_the_old_session",
            ),
        ),
    ),
    "masked": Promise(
        text="Our token is masked wherever it could be read, and a child gets an allow-list environment",
        tests=(
            "app/test_executing.py::test_the_token_is_masked_wherever_the_work_says_it",
            "store/test_output.py::test_no_secret_is_ever_shown_however_it_is_cut",
            "store/test_output.py::test_what_looks_like_a_named_token_is_masked_however_it_is_cut",
            "server/test_logs.py::test_a_masked_secret_is_in_no_line",
            "server/test_tokens.py::test_no_log_line_shows_a_token",
            "roles/test_process_role.py::test_child_gets_the_allow_list_and_the_roles_own_variables_only",
        ),
        mutants=(
            Mutant(
                file="vespera_exec/app/opening.py",
                right="                        secrets=(token.encode(),),\n",
                wrong="",
                caught_by="app/test_executing.py::test_the_token_is_masked_wherever_the_work_says_it",
            ),
            Mutant(
                file="roles/runners/process.py",
                right="base = dict(caller.env) if",
                wrong="base = dict(os.environ) if",
                caught_by="roles/test_process_role.py::test_child_gets_the_allow_list_and_the_roles_own_variables_only",
            ),
        ),
    ),
    "commands": Promise(
        text="Commands come from the operator's role files, as argv; what a repository brought is not run",
        tests=(
            "roles/test_process_role.py::test_shell_characters_mean_nothing",
            "roles/test_process_role.py::test_value_cannot_become_an_option",
            "server/test_http.py::test_commands_come_by_the_socket_only",
            "app/test_executing.py::test_what_is_queued_in_a_directory_that_came_with_a_repository_is_never_run",
        ),
        mutants=(
            Mutant(
                file="vespera_exec/app/starting.py",
                right="            return self.settings.allow_command_over_tcp and",
                wrong="            return",
                caught_by="server/test_http.py::test_commands_come_by_the_socket_only",
            ),
            Mutant(
                file="vespera_exec/app/trust.py",
                right="    return not foreign\n",
                wrong="    return True\n",
                caught_by="app/test_executing.py::"
                "test_what_is_queued_in_a_directory_that_came_with_a_repository_is_never_run",
            ),
        ),
    ),
}
