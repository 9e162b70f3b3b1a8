//! Figures by name: what the tables of the C interface hold.

use crate::world::{MIB, World};
use std::collections::HashMap;
use torch_uvm::driver::Location;
use torch_uvm::history::{Actions, RecordContext, Recording};
use torch_uvm::tables::{Table, rows};

/// The rows of a table, by the names of its columns. Times are counted from 1,000,000 on.
fn named(world: &World, table: Table) -> Vec<HashMap<String, u64>> {
    let columns = table.columns();
    let later = |times: &[i64]| times.iter().map(|time| time + 1_000_000).collect();
    let numbers = rows(table, &world.allocator, 0, later).unwrap();
    assert_eq!(numbers.len() % columns.len(), 0, "{} has rows of {} numbers", table.name(), columns.len());
    let name =
        |row: &[u64]| columns.iter().zip(row).map(|(column, number)| (column.name.to_string(), *number)).collect();
    numbers.chunks(columns.len()).map(name).collect()
}

#[test]
fn tables_hold_what_the_allocator_tells() {
    let mut world = World::small();
    let recording =
        Recording { enabled: true, capacity: 10, level: RecordContext::Never, clear: false, skip: Actions::default() };
    world.allocator.set_history(recording);
    let tensors = [20, 40].map(|mib| world.tensor(mib * MIB, 0).unwrap());
    world.allocator.hints().prefetch(tensors[1].ptr, tensors[1].bytes, Location::Host, tensors[1].stream).unwrap();

    let [info]: [_; 1] = named(&world, Table::MemoryInfo).try_into().unwrap();
    let expected = world.allocator.memory_info(0).unwrap();
    assert_eq!((info["capacity"], info["reserved"]), (expected.capacity, 60 * MIB));
    assert_eq!((info["populated_device"], info["populated_host"]), (20 * MIB, 40 * MIB));
    assert_eq!((info["device_total"], info["host_total"]), (expected.device.total, expected.host.total));

    let [statistics]: [_; 1] = named(&world, Table::Statistics).try_into().unwrap();
    assert_eq!((statistics["populated_device"], statistics["populated_device_peak"]), (20 * MIB, 60 * MIB));
    assert_eq!((statistics["moved_to_host"], statistics["prefetches"]), (40 * MIB, 1));

    let segments = named(&world, Table::Segments);
    let populated = |place: &str| segments.iter().map(|segment| segment[place]).sum::<u64>();
    assert_eq!((populated("populated_device"), populated("populated_host")), (20 * MIB, 40 * MIB));
    assert!(segments.iter().all(|segment| segment["growing"] == 1 && segment["memory"] == 0), "{segments:?}");

    let samples = named(&world, Table::PlaceSamples);
    let last = samples.last().unwrap();
    assert_eq!((last["device"], last["host"]), (20 * MIB, 40 * MIB));
    assert!(samples.iter().all(|sample| sample["time_us"] >= 1_000_000), "{samples:?}");
}

#[test]
fn a_device_that_is_not_there() {
    let world = World::small();
    for table in Table::ALL {
        assert!(rows(table, &world.allocator, 7, <[i64]>::to_vec).is_err(), "{}", table.name());
    }
}
