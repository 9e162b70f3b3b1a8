//! Physical memory: the books of each device and of the host, and where managed pages go.
//!
//! As measured on real hardware, a device's free figure falls when managed pages are populated there and does not rise when
//! they leave: the driver keeps the chunks for other managed pages, until an allocation that had pages there is freed. Plain
//! device memory is never evicted; to make room for it or for other pages, the least recently used managed pages go to the
//! host. What CUDA does when the host is full too is chosen so:
//! - a prefetch succeeds and leaves the pages that found no room where they were (`Counters::prefetch_skipped`);
//! - an access that must have memory gets it and is counted (`Counters::host_overcommitted`): a real machine would have
//!   killed a process, or hung.

use crate::managed::{Managed, PAGE, Page, Place};
use crate::profile::{Config, Costs};
use crate::types::{Counters, Peak, Peaks, Populated, Traffic};
use std::collections::{BTreeMap, VecDeque};

/// Remote accesses after which hardware with access counters moves a page.
const HOT: u8 = 4;

/// The driver takes device memory for managed pages in batches of this size (measured).
const BATCH: u64 = 128 << 20;

/// Why a page moves.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Cause {
    Fault,
    Prefetch,
    Eviction,
}

/// One device's books, in bytes.
#[derive(Default, Debug)]
pub(crate) struct DeviceBooks {
    pub total: u64,
    /// Plain allocations.
    pub plain: u64,
    /// Other processes.
    pub others: u64,
    /// What the driver holds for managed pages; never less than `resident`.
    pub chunks: u64,
    /// Managed pages that are here.
    pub resident: u64,
    /// Uses of managed pages, oldest first: allocation, page, stamp. An entry whose stamp is not the page's is out of date.
    recent: VecDeque<(u64, u32, u64)>,
}

/// The host's books, in bytes.
#[derive(Default, Debug)]
pub(crate) struct HostBooks {
    pub total: u64,
    pub others: u64,
    pub pinned: u64,
    /// Managed pages that are here.
    pub managed: u64,
}

/// All physical memory, and the managed allocations by address.
pub(crate) struct Physical {
    pub devices: Vec<DeviceBooks>,
    pub host: HostBooks,
    pub managed: BTreeMap<u64, Managed>,
    pub counters: Counters,
    pub traffic: Traffic,
    pub populated: Populated,
    pub peaks: Peaks,
    costs: Costs,
    /// One memory for all: the device's total is the host's.
    integrated: bool,
    /// Hardware that reaches host memory without faults, and counts accesses.
    coherent: bool,
    direct_host_access: bool,
    stamp: u64,
}

/// Nanoseconds for moving `bytes` at `speed` bytes a nanosecond.
pub(crate) fn time(bytes: u64, speed: f64) -> f64 {
    bytes as f64 / speed
}

impl Physical {
    pub fn new(config: &Config) -> Physical {
        let profile = &config.profile;
        let device = || DeviceBooks { total: profile.device_memory, ..DeviceBooks::default() };
        Physical {
            devices: (0..config.devices).map(|_| device()).collect(),
            host: HostBooks { total: profile.host_memory, ..HostBooks::default() },
            managed: BTreeMap::new(),
            counters: Counters::default(),
            traffic: Traffic::default(),
            populated: Populated::default(),
            peaks: Peaks { devices: vec![Peak::default(); config.devices as usize], ..Peaks::default() },
            costs: profile.costs.clone(),
            integrated: profile.integrated,
            coherent: profile.host_page_tables,
            direct_host_access: profile.direct_host_access,
            stamp: 0,
        }
    }

    // ---- what happened ------------------------------------------------------------------------------------------

    /// Counts from nothing again; the peaks begin with what is in use.
    pub fn reset_counters(&mut self) {
        self.counters = Counters::default();
        self.traffic = Traffic::default();
        self.populated = Populated::default();
        self.peaks = Peaks { devices: vec![Peak::default(); self.devices.len()], ..Peaks::default() };
        for device in 0..self.devices.len() {
            self.note_device(device);
        }
        self.note_host();
    }

    fn note_device(&mut self, device: usize) {
        let (books, peak) = (&self.devices[device], &mut self.peaks.devices[device]);
        peak.managed = peak.managed.max(books.resident);
        peak.plain = peak.plain.max(books.plain);
        peak.total = peak.total.max(books.resident + books.plain);
        self.note_all();
    }

    fn note_host(&mut self) {
        let (books, peak) = (&self.host, &mut self.peaks.host);
        peak.managed = peak.managed.max(books.managed);
        peak.plain = peak.plain.max(books.pinned);
        peak.total = peak.total.max(books.managed + books.pinned);
        self.note_all();
    }

    fn note_all(&mut self) {
        let devices: u64 = self.devices.iter().map(|books| books.resident + books.plain).sum();
        self.peaks.all = self.peaks.all.max(devices + self.host.managed + self.host.pinned);
    }

    // ---- what is left -------------------------------------------------------------------------------------------

    /// Bytes of the one memory of an integrated machine that are in use.
    fn shared_used(&self) -> u64 {
        let devices: u64 = self.devices.iter().map(|d| d.plain + d.others + d.resident).sum();
        devices + self.host.others + self.host.pinned + self.host.managed
    }

    /// What `cuMemGetInfo` calls free.
    pub fn device_free(&self, device: usize) -> u64 {
        let books = &self.devices[device];
        if self.integrated {
            return books.total.saturating_sub(self.shared_used());
        }
        books.total.saturating_sub(books.plain + books.others + books.chunks)
    }

    /// What `MemAvailable` would be.
    pub fn host_available(&self) -> u64 {
        if self.integrated {
            return self.host.total.saturating_sub(self.shared_used());
        }
        self.host.total.saturating_sub(self.host.others + self.host.pinned + self.host.managed)
    }

    // ---- making room --------------------------------------------------------------------------------------------

    /// Makes room for plain device memory; whether there is.
    pub fn take_plain(&mut self, device: usize, bytes: u64) -> bool {
        if !self.integrated {
            // Whether it can be done at all is known before anything is evicted for it: a failed call changes nothing.
            let books = &self.devices[device];
            let reach = books.total.saturating_sub(books.plain + books.others);
            let leave = (books.chunks + bytes).saturating_sub(reach).min(books.chunks);
            let must_go = leave.saturating_sub(books.chunks - books.resident);
            if bytes > reach || must_go > self.host_available() {
                return false;
            }
            while self.devices[device].chunks - self.devices[device].resident < leave {
                if self.evict_one(device).is_none() {
                    return false;
                }
            }
            self.devices[device].chunks -= leave;
        } else if bytes > self.device_free(device) {
            return false;
        }
        self.devices[device].plain += bytes;
        self.note_device(device);
        true
    }

    /// Gives plain device memory back.
    pub fn give_plain(&mut self, device: usize, bytes: u64) {
        self.devices[device].plain -= bytes;
    }

    /// Books pinned host memory in. There is room.
    pub fn take_pinned(&mut self, bytes: u64) {
        self.host.pinned += bytes;
        self.note_host();
    }

    /// Makes room for one managed page on a device, evicting if need be; the time it took, or `None` if there is none.
    fn room(&mut self, device: usize, bytes: u64) -> Option<f64> {
        let mut spent = 0.0;
        loop {
            let free = self.device_free(device);
            let books = &mut self.devices[device];
            let spare = books.chunks - books.resident;
            if self.integrated {
                // One memory for all: nothing to evict to, and free memory does rise again.
                return (free >= bytes).then_some(spent);
            }
            if spare + free >= bytes {
                if spare < bytes {
                    books.chunks += free.min(BATCH).max(bytes - spare);
                }
                return Some(spent);
            }
            spent += self.evict_one(device)?;
        }
    }

    /// Moves the least recently used page off a device; the time it took, or `None` if nothing can go.
    fn evict_one(&mut self, device: usize) -> Option<f64> {
        let here = Place::device(device as i32);
        if self.devices[device].resident == 0 {
            return None;
        }
        let (base, index) = match self.oldest(device) {
            Some(found) => found,
            None => {
                self.rebuild(device);
                self.oldest(device)?
            }
        };
        let (page, bytes) = self.page(base, index)?;
        let mut spent = 0.0;
        // A copy elsewhere, or contents that nobody wants: nothing has to be written back.
        if page.at != here.bit() || page.discarded {
            self.leave(base, index, here);
        } else {
            if self.host_available() < bytes {
                // Nothing moved: the page keeps its turn.
                let stamp = page.stamp;
                self.devices[device].recent.push_front((base, index as u32, stamp));
                return None;
            }
            self.leave(base, index, here);
            self.arrive(base, index, Place::HOST);
            spent = self.moved(here.bit(), Place::HOST, bytes, Cause::Eviction);
        }
        self.counters.evictions += 1;
        Some(spent)
    }

    fn oldest(&mut self, device: usize) -> Option<(u64, usize)> {
        let here = Place::device(device as i32).bit();
        while let Some((base, index, stamp)) = self.devices[device].recent.pop_front() {
            let page = self.managed.get(&base).and_then(|m| m.pages.get(index as usize));
            if page.is_some_and(|page| page.stamp == stamp && page.at & here != 0) {
                return Some((base, index as usize));
            }
        }
        None
    }

    /// Lists a device's pages afresh: needed after copies of read-mostly pages on several devices shared one stamp.
    fn rebuild(&mut self, device: usize) {
        let here = Place::device(device as i32).bit();
        let mut all: Vec<(u64, u32, u64)> = Vec::new();
        for (&base, managed) in self.managed.iter().filter(|(_, m)| m.resident[device] > 0) {
            let pages = managed.pages.iter().enumerate().filter(|(_, page)| page.at & here != 0);
            all.extend(pages.map(|(index, page)| (base, index as u32, page.stamp)));
        }
        all.sort_unstable_by_key(|&(_, _, stamp)| stamp);
        self.devices[device].recent = all.into();
    }

    fn used_now(&mut self, base: u64, index: usize, device: usize) {
        self.stamp += 1;
        let stamp = self.stamp;
        let books = &mut self.devices[device];
        books.recent.push_back((base, index as u32, stamp));
        if let Some(page) = self.managed.get_mut(&base).and_then(|m| m.pages.get_mut(index)) {
            page.stamp = stamp;
        }
        if self.devices[device].recent.len() as u64 > 4 * (self.devices[device].resident / PAGE) + 4096 {
            self.rebuild(device);
        }
    }

    // ---- one page -----------------------------------------------------------------------------------------------

    fn page(&self, base: u64, index: usize) -> Option<(Page, u64)> {
        let managed = self.managed.get(&base)?;
        Some((*managed.pages.get(index)?, managed.page_bytes(index)))
    }

    fn page_mut(&mut self, base: u64, index: usize) -> Option<&mut Page> {
        self.managed.get_mut(&base)?.pages.get_mut(index)
    }

    /// Books a page in at a place. There is room.
    fn arrive(&mut self, base: u64, index: usize, place: Place) {
        let Some(managed) = self.managed.get_mut(&base) else { return };
        let bytes = managed.page_bytes(index);
        if managed.pages[index].at & place.bit() != 0 {
            return;
        }
        managed.pages[index].at |= place.bit();
        managed.pages[index].heat = 0;
        match place.as_device() {
            None => {
                self.host.managed += bytes;
                managed.host += bytes;
                self.note_host();
            }
            Some(device) => {
                let books = &mut self.devices[device];
                books.resident += bytes;
                books.chunks = books.chunks.max(books.resident);
                managed.resident[device] += bytes;
                managed.peak[device] = managed.peak[device].max(managed.resident[device]);
                self.note_device(device);
                self.used_now(base, index, device);
            }
        }
    }

    /// Books a page out of a place.
    fn leave(&mut self, base: u64, index: usize, place: Place) {
        let Some(managed) = self.managed.get_mut(&base) else { return };
        let bytes = managed.page_bytes(index);
        if managed.pages[index].at & place.bit() == 0 {
            return;
        }
        managed.pages[index].at &= !place.bit();
        match place.as_device() {
            None => {
                self.host.managed -= bytes;
                managed.host -= bytes;
            }
            Some(device) => {
                let books = &mut self.devices[device];
                books.resident -= bytes;
                if self.integrated {
                    books.chunks = books.resident;
                }
                managed.resident[device] -= bytes;
            }
        }
    }

    fn leave_all_but(&mut self, base: u64, index: usize, keep: Place) {
        let Some((page, _)) = self.page(base, index) else { return };
        for bit in 0..32u8 {
            if page.at & (1 << bit) != 0 && bit != keep.0 {
                self.leave(base, index, Place(bit));
            }
        }
    }

    /// Room for a page at a place; the time it took, or `None`. With `must`, the host always has room.
    fn room_at(&mut self, place: Place, bytes: u64, must: bool) -> Option<f64> {
        match place.as_device() {
            Some(device) => self.room(device, bytes),
            None => {
                let short = bytes.saturating_sub(self.host_available());
                if short > 0 {
                    if !must {
                        return None;
                    }
                    self.counters.host_overcommitted += short;
                }
                Some(0.0)
            }
        }
    }

    /// Counts a page's move and gives the time it takes.
    fn moved(&mut self, from: u32, to: Place, bytes: u64, cause: Cause) -> f64 {
        self.counters.migrations += 1;
        let costs = &self.costs;
        let (traffic, h2d) = match cause {
            Cause::Fault => (&mut self.traffic.faults, costs.migrate_fault),
            Cause::Prefetch => (&mut self.traffic.prefetches, costs.prefetch_h2d),
            Cause::Eviction => (&mut self.traffic.evictions, costs.prefetch_h2d),
        };
        let (here, all, speed) = match (from & Place::HOST.bit() != 0, to.as_device()) {
            (true, Some(_)) => (&mut traffic.bytes_h2d, &mut self.counters.bytes_h2d, h2d),
            (true, None) => return 0.0,
            (false, None) => (&mut traffic.bytes_d2h, &mut self.counters.bytes_d2h, costs.prefetch_d2h),
            (false, Some(_)) => (&mut traffic.bytes_d2d, &mut self.counters.bytes_d2d, costs.prefetch_h2d),
        };
        *here += bytes;
        *all += bytes;
        let spent = time(bytes, speed);
        traffic.count += 1;
        traffic.nanoseconds += spent.round() as u64;
        spent
    }

    /// Counts a use of `used` bytes of a page that stays at another place, and gives the time it takes.
    fn reached(&mut self, at: u32, who: Place, write: bool, used: u64) -> f64 {
        self.counters.bytes_remote += used;
        let spent = time(used, self.costs.remote);
        let remote = &mut self.traffic.remote;
        // What the host writes to a device's memory goes the way of what a device reads from the host's.
        let direction = match (at & Place::HOST.bit() != 0, who.as_device()) {
            (false, Some(_)) => &mut remote.bytes_d2d,
            (true, _) if write => &mut remote.bytes_d2h,
            (false, None) if !write => &mut remote.bytes_d2h,
            _ => &mut remote.bytes_h2d,
        };
        *direction += used;
        remote.count += 1;
        remote.nanoseconds += spent.round() as u64;
        spent
    }

    /// Counts a device's use of `bytes` of a chunk of host memory, and gives the time it takes.
    pub fn reached_host_chunk(&mut self, bytes: u64, write: bool) -> f64 {
        self.reached(Place::HOST.bit(), Place::device(0), write, bytes)
    }

    /// Counts a page's zero-filling at a place and gives the time it takes.
    fn filled(&mut self, place: Place, bytes: u64, by_fault: bool) -> f64 {
        let costs = &self.costs;
        let (filled, device) = match by_fault {
            true => (&mut self.populated.faults, costs.populate_fault),
            false => (&mut self.populated.prefetches, costs.populate_prefetch),
        };
        let (here, all, speed) = match place.as_device() {
            Some(_) => (&mut filled.bytes_device, &mut self.counters.populated_device, device),
            None => (&mut filled.bytes_host, &mut self.counters.populated_host, costs.populate_host),
        };
        *here += bytes;
        *all += bytes;
        let spent = time(bytes, speed);
        filled.nanoseconds += spent.round() as u64;
        spent
    }

    // ---- what happens to pages ----------------------------------------------------------------------------------

    /// Brings a page to a place, or copies it there if it is read-mostly: a prefetch. The time it took.
    pub fn prefetch_page(&mut self, base: u64, index: usize, to: Place) -> f64 {
        let Some((page, bytes)) = self.page(base, index) else { return 0.0 };
        if page.at & to.bit() != 0 {
            if let Some(page) = self.page_mut(base, index) {
                page.discarded = false;
            }
            if let Some(device) = to.as_device() {
                self.used_now(base, index, device);
            }
            return 0.0;
        }
        let Some(mut spent) = self.room_at(to, bytes, false) else {
            self.counters.prefetch_skipped += bytes;
            return 0.0;
        };
        // Making room may have moved this very page.
        let from = self.page(base, index).map_or(0, |(page, _)| page.at);
        if from == 0 || page.discarded {
            self.leave_all_but(base, index, to);
            spent += self.filled(to, bytes, false);
        } else {
            spent += self.moved(from, to, bytes, Cause::Prefetch);
            if !page.read_mostly {
                self.leave_all_but(base, index, to);
            }
        }
        self.arrive(base, index, to);
        if let Some(page) = self.page_mut(base, index) {
            page.discarded = false;
        }
        spent
    }

    /// A processor reads or writes a part of a managed allocation. The time it took beyond the access of resident memory.
    pub fn access(&mut self, base: u64, offset: u64, bytes: u64, who: Place, write: bool) -> f64 {
        let end = offset + bytes;
        Managed::span(offset, bytes)
            .map(|index| {
                let page = index as u64 * PAGE;
                let used = end.min(page + PAGE) - offset.max(page);
                self.access_page(base, index, who, write, used)
            })
            .sum()
    }

    /// A processor reads or writes `used` bytes of a page: what the fault handler and the mappings make of it. The time it
    /// took beyond the access of resident memory.
    fn access_page(&mut self, base: u64, index: usize, who: Place, write: bool, used: u64) -> f64 {
        let Some((page, bytes)) = self.page(base, index) else { return 0.0 };
        let mut spent = 0.0;
        if page.discarded && write {
            self.counters.slow_discard_writes += bytes;
            spent += time(bytes, self.costs.write_discarded);
            if let Some(page) = self.page_mut(base, index) {
                page.discarded = false;
            }
        }
        if page.at & who.bit() != 0 {
            if write {
                self.leave_all_but(base, index, who);
            }
            if let Some(device) = who.as_device() {
                self.used_now(base, index, device);
            }
            return spent;
        }
        if page.at == 0 {
            self.count_fault(who);
            return spent + self.first_touch(base, index, who, write, used);
        }
        if (write || !page.read_mostly) && self.reaches(&page, who) {
            let hot = self.coherent && page.heat.saturating_add(1) >= HOT && page.preferred.place().is_none();
            if !hot {
                spent += self.reached(page.at, who, write, used);
                if let Some(page) = self.page_mut(base, index) {
                    page.heat = page.heat.saturating_add(1);
                }
                if write && page.read_mostly {
                    let keep = Place(page.at.trailing_zeros() as u8);
                    self.leave_all_but(base, index, keep);
                }
                return spent;
            }
        } else {
            self.count_fault(who);
        }
        let Some(room) = self.room_at(who, bytes, true) else {
            // The device holds nothing but plain memory: the page stays where it is and is reached from there.
            return spent + self.reached(page.at, who, write, used);
        };
        spent += room;
        let from = self.page(base, index).map_or(page.at, |(page, _)| page.at);
        spent += self.moved(from, who, bytes, Cause::Fault);
        if write || !page.read_mostly {
            self.leave_all_but(base, index, who);
        }
        self.arrive(base, index, who);
        spent
    }

    fn count_fault(&mut self, who: Place) {
        match who.as_device() {
            Some(_) => self.counters.device_faults += 1,
            None => self.counters.host_faults += 1,
        }
    }

    /// Gives a page its first memory, at the preferred location if it has one, else where it is touched.
    fn first_touch(&mut self, base: u64, index: usize, who: Place, write: bool, used: u64) -> f64 {
        let Some((page, bytes)) = self.page(base, index) else { return 0.0 };
        let wanted = page.preferred.place().filter(|&place| self.can_reach(who, place)).unwrap_or(who);
        let (place, mut spent) = match self.room_at(wanted, bytes, true) {
            Some(spent) => (wanted, spent),
            None => (Place::HOST, self.room_at(Place::HOST, bytes, true).unwrap_or(0.0)),
        };
        spent += self.filled(place, bytes, true);
        if place != who {
            spent += self.reached(place.bit(), who, write, used);
        }
        self.arrive(base, index, place);
        spent
    }

    /// Whether a processor can have memory at a place mapped.
    fn can_reach(&self, who: Place, place: Place) -> bool {
        who == place || who.as_device().is_some() || self.direct_host_access
    }

    /// Whether a processor reaches a page that is elsewhere without moving it.
    fn reaches(&self, page: &Page, who: Place) -> bool {
        let preferred = page.preferred.place();
        if preferred == Some(who) {
            return false;
        }
        let stays = preferred.is_some_and(|place| page.at & place.bit() != 0);
        let mapped = page.accessed_by & who.bit() != 0 || stays;
        match who.as_device() {
            Some(_) => mapped || (self.coherent && page.at & Place::HOST.bit() != 0),
            None => self.direct_host_access && mapped,
        }
    }

    /// Drops a page's contents. It keeps its memory until someone else needs it.
    pub fn discard_page(&mut self, base: u64, index: usize) {
        let Some((page, bytes)) = self.page(base, index) else { return };
        if page.at != 0 {
            self.counters.discarded += bytes;
            if let Some(page) = self.page_mut(base, index) {
                page.discarded = true;
            }
        }
    }

    /// Books all pages of a managed allocation out, and forgets it. The bytes it had on devices and in the host.
    pub fn forget(&mut self, base: u64) -> (u64, u64) {
        let Some(managed) = self.managed.remove(&base) else { return (0, 0) };
        self.host.managed -= managed.host;
        let last = self.managed.is_empty();
        for (device, books) in self.devices.iter_mut().enumerate() {
            books.resident -= managed.resident[device];
            let spare = books.chunks - books.resident;
            let had = managed.peak[device].next_multiple_of(BATCH);
            books.chunks -= if last { spare } else { spare.min(had) };
            if last {
                books.recent.clear();
            }
        }
        (managed.resident.iter().sum(), managed.host)
    }

    /// What must hold at all times. For tests.
    pub fn check(&self) -> Result<(), String> {
        for (device, books) in self.devices.iter().enumerate() {
            let here = Place::device(device as i32).bit();
            let count = |m: &Managed| -> u64 {
                (0..m.pages.len()).filter(|&i| m.pages[i].at & here != 0).map(|i| m.page_bytes(i)).sum()
            };
            let sum: u64 = self.managed.values().map(count).sum();
            if sum != books.resident {
                return Err(format!("device {device}: pages hold {sum} bytes, the books say {}", books.resident));
            }
            if books.resident > books.chunks {
                return Err(format!(
                    "device {device}: {} resident bytes in {} of chunks",
                    books.resident, books.chunks
                ));
            }
            if !self.integrated && books.plain + books.others + books.chunks > books.total {
                return Err(format!("device {device} holds more than it has: {books:?}"));
            }
        }
        let host = |m: &Managed| -> u64 {
            (0..m.pages.len()).filter(|&i| m.pages[i].at & 1 != 0).map(|i| m.page_bytes(i)).sum()
        };
        let sum: u64 = self.managed.values().map(host).sum();
        if sum != self.host.managed {
            return Err(format!("host: pages hold {sum} bytes, the books say {}", self.host.managed));
        }
        let copied = |page: &Page| page.at.count_ones() > 1 && !page.read_mostly;
        if self.managed.values().flat_map(|m| &m.pages).any(copied) {
            return Err("a page that is not read-mostly is in two places".to_owned());
        }
        Ok(())
    }

    /// Undoes the copies of pages that are read-mostly no longer: the host's copy stays, or else the first.
    pub fn end_copies(&mut self, base: u64, span: std::ops::Range<usize>) {
        for index in span {
            if let Some((page, _)) = self.page(base, index)
                && page.at.count_ones() > 1
            {
                self.leave_all_but(base, index, Place(page.at.trailing_zeros() as u8));
            }
        }
    }
}
