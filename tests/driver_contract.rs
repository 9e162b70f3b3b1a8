//! The executable form of what `src/driver/mod.rs` promises: the same tests on every kind of simulated device and on
//! a real GPU.
//!
//! `cargo test --test driver_contract` runs the simulated ones. With `TORCH_UVM_CONTRACT=cuda` the tests of the
//! module `cuda` run on the first GPU as well, and those of `cuda_12_0` too, with the forms of calls that drivers
//! before CUDA 12.2 have; docs/driver-contract.md says what they found.

mod contract;

use contract::simulated::SimulatedMachine;
use torch_uvm_sim::{Profile, Schedule};

/// Makes a test of each contract function, with a machine of `$machine` (an `Option`: none is a test not run).
macro_rules! contract {
    (all { $($module:ident: $machine:expr;)* } chunks { $($chunks:ident: $with_chunks:expr;)* }) => {
        $(contract! { @and_chunks $module, $machine,
            allocator: [
                every_placement_serves_memory
                the_cap_holds
                a_recorded_block_waits_for_its_stream
                a_capture_survives_allocations
            ]
            capture: [
                every_call_in_every_situation
                the_capture_mode_belongs_to_a_thread
                a_segment_grows_inside_a_capture
                discarding_while_a_stream_captures
                an_invalidated_capture_is_told_at_its_end
                an_invalidated_capture_can_be_ended_and_repeated
            ]
            memory: [
                allocations_are_aligned
                allocations_are_disjoint
                managed_memory_holds_nothing_until_populated
                a_range_grows_in_steps
                bytes_survive_moves
                discarded_memory_is_used_again
                bad_discards_are_told
                every_advice_can_be_given_and_taken_back
                host_memory_is_told
                devices_are_described
                bad_arguments_are_told
                absurd_managed_sizes_are_refused
            ]
            order: [
                an_event_never_recorded_is_complete
                an_event_waits_for_what_was_queued_before_it
                recording_again_replaces_the_record
                a_pending_event_can_be_destroyed
                a_busy_stream_can_be_destroyed
                synchronising_waits
                freeing_waits_for_the_device
                other_calls_do_not_wait
                a_prefetch_is_ordered_on_its_stream
                a_stream_waits_for_an_event
                a_discard_is_ordered_on_its_stream
                streams_are_independent
                threads_keep_their_context
                frequent_calls_take_microseconds
            ]
        })*
        $(contract! { @and_chunks $chunks, $with_chunks, })*
    };
    (@and_chunks $module:ident, $machine:expr, $($others:tt)*) => {
        contract! { @module $module, $machine, $($others)*
            chunks: [
                chunks_are_described
                addresses_hold_nothing
                chunks_hold_bytes
                pointers_are_told
                figures_are_exact
                bytes_belong_to_the_chunk
                contents_move_under_a_fixed_address
                what_must_not_be_is_refused
                access_is_given_anew
                several_devices_reach_a_chunk
                the_cpu_reaches_host_chunks
                chunks_do_not_wait
                a_segment_of_chunks_grows_inside_a_capture
                a_descriptor_keeps_the_memory
                another_process_maps_a_chunk
                an_unmapped_address_ends_the_context
                host_chunks_are_counted
                costs_are_told
            ]
        }
    };
    (@module $module:ident, $machine:expr, $($area:ident: [$($test:ident)*])*) => {
        mod $module {
            $($(
                #[test]
                fn $test() {
                    crate::contract::TEST.set(concat!(stringify!($module), "::", stringify!($test)));
                    if let Some(machine) = $machine {
                        crate::contract::$area::$test(&machine);
                    }
                }
            )*)*
        }
    };
}

/// A simulated machine, always there.
fn simulated(profile: Profile, schedule: Schedule) -> Option<SimulatedMachine> {
    Some(SimulatedMachine::new(profile, schedule))
}

/// A simulated machine of several devices.
fn several(profile: Profile) -> Option<SimulatedMachine> {
    Some(SimulatedMachine::with_devices(profile, 3))
}

contract! {
    all {
        sim_h100: crate::simulated(crate::Profile::h100(), crate::Schedule::Late);
        sim_h100_no_host_chunks: crate::simulated(crate::Profile::h100_no_host_chunks(), crate::Schedule::Seeded(3));
        sim_gh200: crate::simulated(crate::Profile::gh200(), crate::Schedule::Seeded(1));
        sim_gh200_egm: crate::simulated(crate::Profile::gh200_egm(), crate::Schedule::Eager);
        sim_gb10: crate::simulated(crate::Profile::gb10(), crate::Schedule::Seeded(2));
        cuda: crate::contract::real::RealMachine::if_wanted(i32::MAX);
        cuda_12_0: crate::contract::real::RealMachine::if_wanted(12000);
    }
    // Without concurrent managed access most of the rest is not promised.
    chunks {
        sim_wsl: crate::simulated(crate::Profile::rtx4090_wsl(), crate::Schedule::Late);
        sim_three_h100: crate::several(crate::Profile::h100());
    }
}
