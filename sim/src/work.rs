//! The operations a stream runs, and what running one does.

use crate::chunks::Use;
use crate::error::{Code, Step, fail};
use crate::managed::{Managed, Place};
use crate::memory;
use crate::physical::time;
use crate::state::{Body, State};
use crate::types::{Access, HostFunc, NodeKind, Rows};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use torch_uvm::driver::{DeviceIndex, Location, Range};

/// Where a copy reads from.
#[derive(Clone)]
pub(crate) enum Source {
    /// Memory, read when the copy runs.
    Address(u64),
    /// Pageable memory as it was when the copy was asked for, rows packed.
    Staged(Arc<[u8]>),
}

/// An operation.
#[derive(Clone)]
pub(crate) enum Work {
    Copy {
        dst: u64,
        src: Source,
        rows: Rows,
    },
    Set {
        dst: u64,
        value: u32,
        width: u8,
        count: u64,
    },
    Kernel {
        accesses: Vec<Access>,
    },
    Host(HostFunc),
    Prefetch {
        range: Range,
        to: Location,
    },
    Discard {
        range: Range,
        prefetch: Option<Location>,
    },
    /// Goes no further until the flag is set.
    Hold(Arc<AtomicBool>),
    /// The place in the queue that an event stands for.
    Record {
        event: u64,
    },
    /// A place in the queue that only has dependencies.
    Wait,
}

impl Work {
    /// The kind of graph node this makes; `None` where a capture makes none.
    pub fn node_kind(&self) -> Option<NodeKind> {
        match self {
            Work::Copy { .. } => Some(NodeKind::Memcpy),
            Work::Set { .. } => Some(NodeKind::Memset),
            Work::Kernel { .. } => Some(NodeKind::Kernel),
            Work::Host(_) => Some(NodeKind::Host),
            Work::Prefetch { .. } | Work::Discard { .. } | Work::Hold(_) | Work::Record { .. } | Work::Wait => None,
        }
    }
}

/// What memory an address range is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Side {
    Device(DeviceIndex),
    Managed {
        base: u64,
    },
    Pinned,
    /// Mapped chunks of host memory: the device reaches them over the link, as it does pinned memory.
    HostChunk,
    Pageable,
}

impl Side {
    fn is_host(self) -> bool {
        matches!(self, Side::Pinned | Side::HostChunk | Side::Pageable)
    }
}

/// The bytes from the first row's first to the last row's last.
fn extent(rows: &Rows, pitch: u64) -> u64 {
    if rows.height == 0 { 0 } else { pitch * (rows.height - 1) + rows.width }
}

impl State {
    /// What `[address, address + bytes)` is; an error if part of it is memory that the machine has freed or never given.
    pub fn side(&self, address: u64, bytes: u64) -> Step<Side> {
        let end = address.checked_add(bytes).ok_or(Code::INVALID_VALUE)?;
        if let Some((base, allocation)) = self.allocation_at(address) {
            if let Body::Mapped { .. } = allocation.body {
                self.check_mapped(address, end, None)?;
            } else if end > base + allocation.rounded {
                return Err(fail(
                    Code::INVALID_VALUE,
                    format!(
                        "{address:#x} + {bytes} runs over the end of the allocation {base:#x} + {}",
                        allocation.bytes
                    ),
                ));
            }
            return Ok(match allocation.body {
                Body::Managed => Side::Managed { base },
                Body::Mapped { host: true, .. } => Side::HostChunk,
                Body::Device | Body::Mapped { .. } | Body::Imported { .. } => Side::Device(allocation.device),
            });
        }
        if let Some((base, host)) = self.host_allocation_at(address) {
            // What goes on beyond registered memory is the caller's own, and pageable.
            return Ok(if end <= base + host.bytes || host.zone.is_some() { Side::Pinned } else { Side::Pageable });
        }
        if self.in_zones(address) {
            return Err(fail(Code::INVALID_VALUE, format!("{address:#x} is not a live allocation")));
        }
        if address == 0 {
            return Err(fail(Code::INVALID_VALUE, "the address is null"));
        }
        Ok(Side::Pageable)
    }

    /// [`State::side`] for a device that uses it, which mapped memory must allow.
    fn side_for(&self, by: (DeviceIndex, Use), address: u64, bytes: u64) -> Step<Side> {
        let side = self.side(address, bytes)?;
        if self.allocation_at(address).is_some_and(|(_, a)| matches!(a.body, Body::Mapped { .. })) {
            self.check_mapped(address, address + bytes, Some(by))?;
        }
        Ok(side)
    }

    /// [`State::side`] of both ends of a copy: destination, source.
    pub fn sides(&self, dst: u64, src: u64, rows: &Rows) -> Step<(Side, Side)> {
        Ok((self.side(dst, extent(rows, rows.dst_pitch))?, self.side(src, extent(rows, rows.src_pitch))?))
    }

    /// Runs an operation that is not a host function; the nanoseconds it took. Fails where a real device would meet an
    /// illegal address.
    pub fn run_work(&mut self, device: DeviceIndex, work: Work) -> Step<f64> {
        self.physical.counters.operations += 1;
        match work {
            Work::Copy { dst, src, rows } => self.run_copy(device, dst, &src, &rows),
            Work::Set { dst, value, width, count } => {
                let bytes = count * u64::from(width);
                let side = self.side_for((device, Use::Kernel), dst, bytes)?;
                let spent = self.access(device, side, dst, bytes, true);
                // Mapped and imported memory is another file's: its pages are not the zone's to give back.
                let own = self.allocation_at(dst).is_some_and(|(_, a)| matches!(a.body, Body::Device | Body::Managed));
                let zone = if own { self.zones.holding(dst) } else { None };
                if !self.running_down {
                    // SAFETY: `side` found the range live (or the caller vouches for his own memory, as with CUDA).
                    unsafe { memory::fill(dst, value, width, count, zone) };
                }
                Ok(spent + time(bytes, self.costs().device_write))
            }
            Work::Kernel { accesses } => {
                let mut spent = 2000.0;
                for Access { range, write } in accesses {
                    let side = self.side_for((device, Use::Kernel), range.ptr.0, range.bytes)?;
                    spent += self.access(device, side, range.ptr.0, range.bytes, write);
                    spent += time(range.bytes, self.costs().device_write);
                }
                Ok(spent)
            }
            Work::Prefetch { range, to } => Ok(self.run_prefetch(range, to)),
            Work::Discard { range, prefetch } => {
                self.run_discard(range);
                Ok(prefetch.map_or(0.0, |to| self.run_prefetch(range, to)))
            }
            Work::Host(_) | Work::Hold(_) | Work::Record { .. } | Work::Wait => Ok(0.0),
        }
    }

    fn run_copy(&mut self, device: DeviceIndex, dst: u64, src: &Source, rows: &Rows) -> Step<f64> {
        let bytes = rows.width * rows.height;
        let by = (device, Use::Copy);
        let to = self.side_for(by, dst, extent(rows, rows.dst_pitch))?;
        let from = match src {
            Source::Address(src) => self.side_for(by, *src, extent(rows, rows.src_pitch))?,
            Source::Staged(_) => Side::Pinned,
        };
        // A copy engine reaches host memory by itself: that is the copy.
        let mut spent = 0.0;
        if !to.is_host() {
            spent += self.access(device, to, dst, extent(rows, rows.dst_pitch), true);
        }
        if let Source::Address(src) = src
            && !from.is_host()
        {
            spent += self.access(device, from, *src, extent(rows, rows.src_pitch), false);
        }
        let costs = &self.config.profile.costs;
        let (counters, copies) = (&mut self.physical.counters, &mut self.physical.traffic.copies);
        let (speed, counter) = match (to.is_host(), from.is_host()) {
            (false, true) => (costs.copy_h2d, Some((&mut counters.bytes_h2d, &mut copies.bytes_h2d))),
            (true, false) => (costs.copy_d2h, Some((&mut counters.bytes_d2h, &mut copies.bytes_d2h))),
            (true, true) => (10.0, None),
            (false, false) => match (to, from) {
                (Side::Device(a), Side::Device(b)) if a != b => {
                    (costs.copy_h2d, Some((&mut counters.bytes_d2d, &mut copies.bytes_d2d)))
                }
                _ => (costs.device_copy, None),
            },
        };
        let took = time(bytes, speed);
        if let Some((all, here)) = counter {
            *all += bytes;
            *here += bytes;
            self.physical.traffic.copies.count += 1;
            self.physical.traffic.copies.nanoseconds += took.round() as u64;
        }
        if self.running_down {
            return Ok(spent + took);
        }
        for row in 0..rows.height {
            let at = dst + row * rows.dst_pitch;
            let from = match src {
                Source::Address(src) => src + row * rows.src_pitch,
                Source::Staged(bytes) => bytes.as_ptr() as u64 + row * rows.width,
            };
            // SAFETY: both ranges were found live just now, or are the caller's own memory, for which he vouches as with CUDA;
            // staged bytes are `width * height` long.
            unsafe { memory::copy(at, from, rows.width) };
        }
        Ok(spent + took)
    }

    /// A device uses memory: managed memory may move, chunks of host memory are reached over the link.
    fn access(&mut self, device: DeviceIndex, side: Side, address: u64, bytes: u64, write: bool) -> f64 {
        if side == Side::HostChunk {
            return self.physical.reached_host_chunk(bytes, write);
        }
        let Side::Managed { base } = side else { return 0.0 };
        if bytes == 0 {
            return 0.0;
        }
        let who = Place::device(device);
        self.physical.access(base, address - base, bytes, who, write)
    }

    fn run_prefetch(&mut self, range: Range, to: Location) -> f64 {
        // Freed since: freeing waits for all work, so this is a graph's or nobody's, and prefetch has nothing to move.
        let Ok(Side::Managed { base }) = self.side(range.ptr.0, range.bytes) else { return 0.0 };
        let place = Place::of(to);
        Managed::span(range.ptr.0 - base, range.bytes)
            .map(|index| self.physical.prefetch_page(base, index, place))
            .sum()
    }

    fn run_discard(&mut self, range: Range) {
        let Ok(Side::Managed { base }) = self.side(range.ptr.0, range.bytes) else { return };
        let Some((_, allocation)) = self.allocation_at(base) else { return };
        let (total, rounded) = (allocation.bytes, allocation.rounded);
        let span = Managed::span_inside(range.ptr.0 - base, range.bytes, total);
        if span.is_empty() {
            return;
        }
        let start = base + span.start as u64 * crate::managed::PAGE;
        let end = (base + span.end as u64 * crate::managed::PAGE).min(base + rounded);
        if let Some(zone) = self.zones.holding(start) {
            zone.drop_pages(start, end - start);
        }
        for index in span {
            self.physical.discard_page(base, index);
        }
    }
}
