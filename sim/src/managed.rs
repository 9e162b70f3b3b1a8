//! Managed memory by 2 MiB page: what is known of each page. Where pages go is decided in [`crate::physical`].

use crate::types::{RangeAdvice, Residency};
use torch_uvm::driver::{Advice, DeviceIndex, Location};

/// The unit of residency.
pub(crate) const PAGE: u64 = 2 << 20;

/// A place where a page can be: the host is 0, device `i` is `i + 1`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Place(pub u8);

impl Place {
    pub const HOST: Place = Place(0);

    pub fn device(device: DeviceIndex) -> Place {
        Place(device as u8 + 1)
    }

    pub fn of(location: Location) -> Place {
        match location {
            Location::Device(device) => Place::device(device),
            Location::Host | Location::HostNuma(_) => Place::HOST,
        }
    }

    pub fn bit(self) -> u32 {
        1 << self.0
    }

    /// The device, if it is one.
    pub fn as_device(self) -> Option<usize> {
        (self.0 as usize).checked_sub(1)
    }
}

/// A location in a page's advice, in 16 bits: 0 none, 1 host, 2 + i device i, 0x100 + n host NUMA node n.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub(crate) struct Hint(u16);

impl Hint {
    fn of(location: Location) -> Hint {
        Hint(match location {
            Location::Host => 1,
            Location::Device(device) => 2 + device as u16,
            Location::HostNuma(node) => 0x100 + node as u16,
        })
    }

    pub fn location(self) -> Option<Location> {
        match self.0 {
            0 => None,
            1 => Some(Location::Host),
            n if n < 0x100 => Some(Location::Device(i32::from(n) - 2)),
            n => Some(Location::HostNuma(i32::from(n) - 0x100)),
        }
    }

    pub fn place(self) -> Option<Place> {
        self.location().map(Place::of)
    }
}

/// One page. All zeros is a page without memory and without advice.
#[derive(Clone, Copy, Default, Debug)]
pub(crate) struct Page {
    /// Bits of the places where it has physical memory; more than one only for a read-mostly page.
    pub at: u32,
    /// Bits of the places that keep it mapped.
    pub accessed_by: u32,
    pub preferred: Hint,
    pub last_prefetch: Hint,
    pub read_mostly: bool,
    /// Contents discarded, and neither written nor prefetched since.
    pub discarded: bool,
    /// Remote accesses since it last moved, where hardware counts them.
    pub heat: u8,
    /// When a device last used it: its entry in the device's least-recently-used list has the same stamp.
    pub stamp: u64,
}

/// The pages of one allocation.
pub(crate) struct Managed {
    pub pages: Vec<Page>,
    /// Bytes of the last page, in units of 64 KiB.
    last_bytes: u64,
    /// The most bytes this allocation has had on each device at once.
    pub peak: Vec<u64>,
    /// The bytes it has on each device now.
    pub resident: Vec<u64>,
    /// The bytes it has in host memory now.
    pub host: u64,
}

impl Managed {
    pub fn new(bytes: u64, devices: usize) -> Managed {
        let pages = bytes.div_ceil(PAGE);
        let tail = bytes - (pages - 1) * PAGE;
        Managed {
            pages: vec![Page::default(); pages as usize],
            last_bytes: tail.div_ceil(64 << 10) * (64 << 10),
            peak: vec![0; devices],
            resident: vec![0; devices],
            host: 0,
        }
    }

    /// The physical memory that page `index` takes.
    pub fn page_bytes(&self, index: usize) -> u64 {
        if index + 1 == self.pages.len() { self.last_bytes } else { PAGE }
    }

    /// The pages that `[offset, offset + bytes)` touches.
    pub fn span(offset: u64, bytes: u64) -> std::ops::Range<usize> {
        (offset / PAGE) as usize..(offset + bytes).div_ceil(PAGE) as usize
    }

    /// The pages that lie wholly inside `[offset, offset + bytes)` of an allocation of `total` bytes.
    pub fn span_inside(offset: u64, bytes: u64, total: u64) -> std::ops::Range<usize> {
        let end = if offset + bytes == total { (offset + bytes).div_ceil(PAGE) } else { (offset + bytes) / PAGE };
        let start = offset.div_ceil(PAGE);
        start as usize..end.max(start) as usize
    }

    /// Writes down advice.
    pub fn advise(&mut self, span: std::ops::Range<usize>, advice: Advice) {
        for page in &mut self.pages[span] {
            match advice {
                Advice::SetPreferredLocation(location) => page.preferred = Hint::of(location),
                Advice::UnsetPreferredLocation => page.preferred = Hint::default(),
                Advice::SetAccessedBy(location) => page.accessed_by |= Place::of(location).bit(),
                Advice::UnsetAccessedBy(location) => page.accessed_by &= !Place::of(location).bit(),
                Advice::SetReadMostly => page.read_mostly = true,
                Advice::UnsetReadMostly => page.read_mostly = false,
            }
        }
    }

    /// Notes a prefetch, for [`Managed::advice`].
    pub fn note_prefetch(&mut self, span: std::ops::Range<usize>, to: Location) {
        for page in &mut self.pages[span] {
            page.last_prefetch = Hint::of(to);
        }
    }

    /// The advice that holds for all pages of the span.
    pub fn advice(&self, span: std::ops::Range<usize>) -> RangeAdvice {
        let pages = &self.pages[span];
        let first = pages.first().copied().unwrap_or_default();
        let common = |hint: fn(&Page) -> Hint| {
            pages.iter().all(|page| hint(page) == hint(&first)).then(|| hint(&first).location()).flatten()
        };
        let mask = pages.iter().fold(u32::MAX, |mask, page| mask & page.accessed_by);
        let accessed_by = (0..32u8)
            .filter(|bit| mask & (1 << bit) != 0)
            .map(|bit| Place(bit).as_device().map_or(Location::Host, |device| Location::Device(device as i32)))
            .collect();
        RangeAdvice {
            read_mostly: pages.iter().all(|page| page.read_mostly),
            preferred: common(|page| page.preferred),
            accessed_by,
            last_prefetch: common(|page| page.last_prefetch),
        }
    }

    /// Adds where the pages of the span are.
    pub fn add_residency(&self, span: std::ops::Range<usize>, sum: &mut Residency) {
        for index in span {
            let (page, bytes) = (&self.pages[index], self.page_bytes(index));
            if page.at == 0 {
                sum.nowhere += bytes;
            }
            if page.at & Place::HOST.bit() != 0 {
                sum.host += bytes;
            }
            for (device, total) in sum.devices.iter_mut().enumerate() {
                if page.at & Place::device(device as i32).bit() != 0 {
                    *total += bytes;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spans() {
        assert_eq!(Managed::span(0, 1), 0..1);
        assert_eq!(Managed::span(PAGE - 1, 2), 0..2);
        assert_eq!(Managed::span_inside(1, 2 * PAGE, 4 * PAGE), 1..2);
        assert_eq!(Managed::span_inside(1, 5, 4 * PAGE), 1..1);
        assert_eq!(Managed::span_inside(PAGE, 5, PAGE + 5), 1..2);
    }

    #[test]
    fn advice_holds_for_all_pages_or_is_not_told() {
        let mut managed = Managed::new(3 * PAGE + 1, 1);
        assert_eq!((managed.pages.len(), managed.page_bytes(3)), (4, 64 << 10));
        managed.advise(0..4, Advice::SetPreferredLocation(Location::HostNuma(0)));
        managed.advise(0..4, Advice::SetAccessedBy(Location::Device(0)));
        managed.advise(0..1, Advice::SetReadMostly);
        let advice = managed.advice(0..4);
        assert_eq!(advice.preferred, Some(Location::HostNuma(0)));
        assert_eq!(advice.accessed_by, [Location::Device(0)]);
        assert!(!advice.read_mostly && managed.advice(0..1).read_mostly);
        managed.advise(1..2, Advice::UnsetPreferredLocation);
        assert_eq!(managed.advice(0..4).preferred, None);
    }
}
