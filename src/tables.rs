//! All that the library tells of itself, by name: tables of numbers, the options and the placements.
//!
//! Programs get the names with the numbers ([`description`], [`rows`]), so nothing outside has a copy of them. What
//! is written from them, Python's types and the README's table of options, is made by `cargo xtask tables`.

use crate::allocator::{Allocator, SegmentPlace};
use crate::budget::MemoryInfo;
use crate::column::{Column, Kind};
use crate::driver::DeviceIndex;
use crate::error::{Error, Result};
use crate::history::PlaceSample;
use crate::options::{AccessPattern, Options};
use crate::place::Place;
use crate::segments::Memory;
use crate::stats::PlaceStats;
use std::fmt::Write;

/// A table of numbers.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Table {
    /// [`MemoryInfo`]: one row.
    MemoryInfo,
    /// [`PlaceStats`]: one row.
    Statistics,
    /// [`SegmentPlace`]: a row for each segment, by address.
    Segments,
    /// [`PlaceSample`]: a row for each change of what is populated, oldest first.
    PlaceSamples,
}

impl Table {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::MemoryInfo, Self::Statistics, Self::Segments, Self::PlaceSamples];

    /// What programs call it.
    pub fn name(self) -> &'static str {
        match self {
            Self::MemoryInfo => "memory_info",
            Self::Statistics => "statistics",
            Self::Segments => "segments",
            Self::PlaceSamples => "place_samples",
        }
    }

    /// The table of this name.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] where there is none.
    pub fn named(name: &str) -> Result<Self> {
        Self::ALL.into_iter().find(|table| table.name() == name).ok_or_else(|| {
            let names = Self::ALL.map(Self::name).join(", ");
            Error::InvalidArgument(format!("table: '{name}' is not allowed: expected one of {names}"))
        })
    }

    /// Its columns.
    pub fn columns(self) -> Vec<Column> {
        fn of<T>(cells: &[Cell<T>]) -> Vec<Column> {
            cells.iter().map(|cell| cell.column.clone()).collect()
        }
        match self {
            Self::MemoryInfo => of(&memory_info()),
            Self::Statistics => PlaceStats::columns(),
            Self::Segments => of(&segments()),
            Self::PlaceSamples => of(&place_samples()),
        }
    }
}

/// A table's numbers for one device, row by row.
///
/// `microseconds` turns the times of the history into microseconds since 1970.
///
/// # Errors
/// The allocator's: there is no such device, or CUDA failed.
pub fn rows(
    table: Table,
    allocator: &Allocator,
    device: DeviceIndex,
    microseconds: impl FnOnce(&[i64]) -> Vec<i64>,
) -> Result<Vec<u64>> {
    fn row<T>(cells: &[Cell<T>], from: &T) -> Vec<u64> {
        cells.iter().map(|cell| (cell.number)(from)).collect()
    }
    fn all<T>(cells: &[Cell<T>], from: &[T]) -> Vec<u64> {
        from.iter().flat_map(|from| cells.iter().map(|cell| (cell.number)(from))).collect()
    }
    Ok(match table {
        Table::MemoryInfo => row(&memory_info(), &allocator.memory_info(device)?),
        Table::Statistics => allocator.place_stats(device)?.numbers(),
        Table::Segments => all(&segments(), &allocator.segment_places(device)?),
        Table::PlaceSamples => {
            let mut samples = allocator.place_samples(device)?;
            let times = microseconds(&samples.iter().map(|sample| sample.time).collect::<Vec<_>>());
            samples.iter_mut().zip(times).for_each(|(sample, time)| sample.time = time);
            all(&place_samples(), &samples)
        }
    })
}

/// A column, and its number in a row that is made of a `T`.
struct Cell<T> {
    column: Column,
    number: fn(&T) -> u64,
}

fn cell<T>(name: &'static str, meaning: &'static str, number: fn(&T) -> u64) -> Cell<T> {
    Cell { column: Column::new(name, meaning), number }
}

fn flag<T>(name: &'static str, meaning: &'static str, number: fn(&T) -> u64) -> Cell<T> {
    Cell { column: Column::new(name, meaning).of_kind(Kind::Flag), number }
}

fn word<T>(
    name: &'static str,
    meaning: &'static str,
    words: &'static [&'static str],
    number: fn(&T) -> u64,
) -> Cell<T> {
    Cell { column: Column::new(name, meaning).of_kind(Kind::Words(words)), number }
}

fn memory_info() -> [Cell<MemoryInfo>; 13] {
    [
        cell("capacity", "Hard cap on what this process may populate, on the device and beside it.", |info| {
            info.capacity
        }),
        cell(
            "free",
            "`capacity` less what is populated and what others hold: what `torch.accelerator.get_memory_info` returns.",
            |info| info.free,
        ),
        cell("populated_device", "Populated by this process and meant to live on the GPU.", |info| {
            info.populated.device
        }),
        cell("populated_host", "Populated by this process in host memory.", |info| info.populated.host),
        cell("populated_unplaced", "Populated by this process, wherever the driver moves it (`balanced`).", |info| {
            info.populated.unplaced
        }),
        cell("allocated", "In live allocations.", |info| info.allocated),
        cell("reserved", "Populated in all, cached memory included.", |info| info.reserved),
        cell("device_limit", "Soft limit on `populated_device`.", |info| info.device_limit),
        cell("device_total", "The device's memory, as CUDA says.", |info| info.device.total),
        cell(
            "device_free",
            "Of it free for everyone, as CUDA says. It rises only when managed memory is freed, not when it moves out.",
            |info| info.device.free,
        ),
        cell("host_total", "The machine's memory, or its cgroup's limit where that is less.", |info| info.host.total),
        cell("host_available", "Of it available now.", |info| info.host.available),
        cell("host_reserve", "Of it left to everyone else.", |info| info.host_reserve),
    ]
}

fn segments() -> [Cell<SegmentPlace>; 14] {
    [
        cell("base", "Address of the first byte.", |segment| segment.base.0),
        cell("range_bytes", "Address space.", |segment| segment.range_bytes),
        cell("filled", "From its start, what blocks fill, holes included.", |segment| segment.filled),
        cell("vacant", "Of that, holes: memory that was given back.", |segment| segment.vacant),
        cell("discarded_end", "Given back beyond `filled`.", |segment| segment.discarded_end),
        cell("populated_device", "Populated on the GPU.", |segment| segment.device),
        cell("populated_host", "Populated in host memory.", |segment| segment.host),
        cell("populated_unplaced", "Populated wherever the driver moves it.", |segment| segment.unplaced),
        word(
            "place",
            "Where it is meant to live. Its pages may have been moved.",
            &["device", "host", "unplaced"],
            |segment| match segment.place {
                Place::Device => 0,
                Place::Host => 1,
                Place::Unplaced => 2,
            },
        ),
        word(
            "memory",
            "`managed`, `device` (plain device memory), or `custom` (a MemPool's own allocator).",
            &["managed", "device", "custom"],
            |segment| match segment.memory {
                Memory::Managed => 0,
                Memory::Device => 1,
                Memory::Custom(_) => 2,
            },
        ),
        flag("small", "Of blocks of at most 1 MiB.", |segment| segment.small.into()),
        flag("growing", "Populated from its start as blocks need it.", |segment| segment.growing.into()),
        cell("pool_first", "The first number of the pool it belongs to; (0, 0) is the default pool.", |segment| {
            segment.pool.0
        }),
        cell("pool_second", "The second number of that pool.", |segment| segment.pool.1),
    ]
}

fn place_samples() -> [Cell<PlaceSample>; 5] {
    [
        cell("time_us", "Microseconds since 1970, as in snapshots.", |sample| sample.time.cast_unsigned()),
        cell("device", "On the GPU.", |sample| sample.populated.device),
        cell("host", "In host memory.", |sample| sample.populated.host),
        cell("unplaced", "Wherever the driver moves it.", |sample| sample.populated.unplaced),
        cell("allocated", "In live allocations.", |sample| sample.allocated),
    ]
}

/// Everything but the numbers, as JSON: the columns of each table, the options, the placements.
pub fn description() -> String {
    let tables = Table::ALL.map(|table| {
        let columns = table.columns().into_iter().map(|column| {
            let words = match column.kind {
                Kind::Words(words) => words.iter().map(|word| json_string(word)).collect::<Vec<_>>().join(", "),
                Kind::Quantity | Kind::Flag => String::new(),
            };
            format!(
                "{{\"name\": {}, \"type\": \"{}\", \"words\": [{words}], \"path\": {}, \"meaning\": {}}}",
                json_string(&column.name),
                column.kind.python_type(),
                json_string(&column.path),
                json_string(column.meaning)
            )
        });
        format!("{}: [{}]", json_string(table.name()), columns.collect::<Vec<_>>().join(", "))
    });
    let options = Options::table().into_iter().map(|option| {
        format!(
            "{{\"key\": {}, \"type\": {}, \"default\": {}, \"meaning\": {}}}",
            json_string(option.key),
            json_string(option.python_type),
            json_string(option.default),
            json_string(&option.meaning)
        )
    });
    let placements = AccessPattern::ALL.iter().map(|pattern| {
        format!("{{\"name\": {}, \"meaning\": {}}}", json_string(pattern.name()), json_string(pattern.meaning()))
    });
    format!(
        "{{\"tables\": {{{}}}, \"options\": [{}], \"placements\": [{}]}}",
        tables.join(", "),
        options.collect::<Vec<_>>().join(", "),
        placements.collect::<Vec<_>>().join(", ")
    )
}

fn json_string(text: &str) -> String {
    let mut quoted = String::from("\"");
    for c in text.chars() {
        match c {
            '"' | '\\' => quoted.extend(['\\', c]),
            c if c < ' ' => {
                // Writing to a String does not fail.
                let _ = write!(quoted, "\\u{:04x}", u32::from(c));
            }
            c => quoted.push(c),
        }
    }
    quoted.push('"');
    quoted
}
