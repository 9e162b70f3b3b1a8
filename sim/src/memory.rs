//! Address space: reserved, not committed, and the bytes in it.
//!
//! A [`Zone`] hands out ranges of memory mapped without access; a live allocation is made readable and writable, a freed one
//! gives its physical memory back and loses access again, so that host code that uses it late dies at once. Nothing
//! here touches a page by itself: physical memory is what the program writes.
//!
//! A shared zone's memory is a file without a name, so that it can be mapped a second time: at addresses reserved by the
//! program (`cuMemMap`), and by other processes (`cuIpcOpenMemHandle`).

use crate::error::{Code, Step, fail};
use std::collections::BTreeMap;
use std::fs::File;
use std::os::fd::{AsRawFd, FromRawFd};

/// The page of the machine that this runs on, in bytes: mappings begin and end with one. 4 KiB on x86-64; on aarch64 it is the
/// kernel's choice, on Grace 64 KiB as a rule.
pub(crate) fn page() -> u64 {
    // SAFETY: the call reads a constant of the process.
    let page = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
    u64::try_from(page).ok().filter(|page| page.is_power_of_two()).unwrap_or(64 << 10)
}

/// A zero fill of at least this size gives the pages back instead of writing zeros.
const DROP_PAGES_FROM: u64 = 64 << 10;

/// Rounds up to a multiple of `to`, a power of two; `None` beyond 2^64.
pub(crate) fn round_up(bytes: u64, to: u64) -> Option<u64> {
    Some(bytes.checked_add(to - 1)? & !(to - 1))
}

/// Address space taken from the host at one time.
struct Chunk {
    base: u64,
    len: u64,
    /// Where it begins in the zone's file.
    offset: u64,
}

/// Ranges of address space of one alignment.
pub(crate) struct Zone {
    align: u64,
    /// The page in which contents are dropped.
    page: u64,
    chunk_bytes: u64,
    chunks: Vec<Chunk>,
    /// What backs a shared zone, and how much of it is in use.
    file: Option<(File, u64)>,
    free: BTreeMap<u64, u64>,
    /// The search goes on where the last one ended, so that freed addresses come back as late as possible.
    cursor: u64,
}

impl Zone {
    /// A zone of ranges aligned to `align` (a power of two, at least a `page`), which takes address space `chunk_bytes` at a
    /// time. `page` is a multiple of [`page()`].
    pub fn new(align: u64, page: u64, chunk_bytes: u64) -> Zone {
        Zone { align, page, chunk_bytes, chunks: Vec::new(), file: None, free: BTreeMap::new(), cursor: 0 }
    }

    /// The same, backed by a file that can be mapped elsewhere; by private memory where the host has no such files.
    pub fn shared(align: u64, page: u64, chunk_bytes: u64) -> Zone {
        // SAFETY: the name is a C string, and a file descriptor that the call gives is ours alone.
        let file = unsafe {
            let descriptor = libc::memfd_create(c"torch-uvm-sim".as_ptr(), libc::MFD_CLOEXEC);
            (descriptor >= 0).then(|| File::from_raw_fd(descriptor))
        };
        let mut zone = Zone::new(align, page, chunk_bytes);
        zone.file = file.map(|file| (file, 0));
        zone
    }

    /// How many bytes an allocation of `bytes` takes.
    pub fn rounded(&self, bytes: u64) -> Step<u64> {
        round_up(bytes, self.align)
            .filter(|&rounded| rounded < 1 << 46)
            .ok_or_else(|| fail(Code::OUT_OF_MEMORY, format!("{bytes} bytes are more than the address space")))
    }

    /// Takes a range of readable, writable, zeroed memory. `bytes` is a multiple of the alignment.
    pub fn take(&mut self, bytes: u64) -> Step<u64> {
        let start = self.reserve(bytes)?;
        if let Err(error) = protect(start, bytes, libc::PROT_READ | libc::PROT_WRITE) {
            self.give(start, bytes);
            return Err(error);
        }
        Ok(start)
    }

    /// Takes a range without access.
    pub fn reserve(&mut self, bytes: u64) -> Step<u64> {
        let start = match self.find(bytes) {
            Some(start) => start,
            None => {
                self.grow(bytes)?;
                self.find(bytes).ok_or_else(|| fail(Code::OUT_OF_MEMORY, "no address space is left"))?
            }
        };
        let Some((block, len)) = self.free.range(..=start).next_back().map(|(&block, &len)| (block, len)) else {
            return Err(fail(Code::UNKNOWN, "the address space's free list is broken"));
        };
        debug_assert!(block == start && len >= bytes);
        self.free.remove(&block);
        if len > bytes {
            self.free.insert(start + bytes, len - bytes);
        }
        self.cursor = start + bytes;
        Ok(start)
    }

    /// Gives a range back: its contents are gone and its pages without access.
    pub fn give(&mut self, start: u64, bytes: u64) {
        self.drop_pages(start, bytes);
        // Failing to take access away only makes a late use harder to see.
        let _ = protect(start, bytes, libc::PROT_NONE);
        let (mut start, mut bytes) = (start, bytes);
        // The block at the cursor stays apart: joined to it, this range would be the next to be handed out.
        if start + bytes != self.cursor
            && let Some(right) = self.free.remove(&(start + bytes))
        {
            bytes += right;
        }
        if start != self.cursor
            && let Some((&left, &len)) = self.free.range(..start).next_back()
            && left + len == start
            && left != self.cursor
        {
            self.free.remove(&left);
            start = left;
            bytes += len;
        }
        self.free.insert(start, bytes);
    }

    fn find(&mut self, bytes: u64) -> Option<u64> {
        if let Some((&start, _)) = self.free.range(self.cursor..).find(|(_, len)| **len >= bytes) {
            return Some(start);
        }
        self.join_all();
        self.free.iter().find(|(_, len)| **len >= bytes).map(|(&start, _)| start)
    }

    /// Joins all neighbours, those at the cursor included. Chunks stay apart unless the kernel put them side by side.
    fn join_all(&mut self) {
        let mut joined: BTreeMap<u64, u64> = BTreeMap::new();
        for (&start, &len) in &self.free {
            match joined.last_entry() {
                Some(mut last) if last.key() + last.get() == start => *last.get_mut() += len,
                _ => {
                    joined.insert(start, len);
                }
            }
        }
        self.free = joined;
    }

    fn grow(&mut self, bytes: u64) -> Step<()> {
        let wanted = bytes.max(self.chunk_bytes) + self.align;
        let Some(chunk) = [wanted, bytes + self.align].into_iter().find_map(|len| self.map_chunk(len)) else {
            return Err(fail(Code::OUT_OF_MEMORY, format!("no address space for {bytes} bytes")));
        };
        let Chunk { base, len, .. } = chunk;
        self.chunks.push(chunk);
        let start = (base + self.align - 1) & !(self.align - 1);
        let usable = (base + len - start) & !(self.align - 1);
        self.free.insert(start, usable);
        Ok(())
    }

    fn map_chunk(&mut self, len: u64) -> Option<Chunk> {
        let Some((file, used)) = &mut self.file else {
            return map_reserved(len).map(|base| Chunk { base, len, offset: 0 });
        };
        let offset = *used;
        file.set_len(offset + len).ok()?;
        let flags = libc::MAP_SHARED | libc::MAP_NORESERVE;
        // SAFETY: a fresh mapping of our own file at an address the kernel chooses touches nothing that exists.
        let base = unsafe {
            let (file, offset) = (file.as_raw_fd(), offset as libc::off_t);
            libc::mmap(std::ptr::null_mut(), len as usize, libc::PROT_NONE, flags, file, offset)
        };
        if base == libc::MAP_FAILED {
            return None;
        }
        *used += len;
        Some(Chunk { base: base as u64, len, offset })
    }

    /// The file behind a live range of a shared zone, and where in it the range begins.
    pub fn file_of(&self, start: u64) -> Option<(i32, u64)> {
        let (file, _) = self.file.as_ref()?;
        let chunk = self.chunks.iter().find(|chunk| (chunk.base..chunk.base + chunk.len).contains(&start))?;
        Some((file.as_raw_fd(), chunk.offset + (start - chunk.base)))
    }

    /// Gives the physical pages of whole pages back: they read as zeros afterwards.
    pub fn drop_pages(&self, start: u64, bytes: u64) {
        if bytes == 0 {
            return;
        }
        match self.file_of(start) {
            Some((file, offset)) => {
                let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
                // SAFETY: the range lies in our own file, and its contents are meant to be lost.
                unsafe { libc::fallocate(file, mode, offset as libc::off_t, bytes as libc::off_t) };
            }
            // SAFETY: callers pass whole pages of this zone's own private mapping, whose contents they mean to lose.
            None => unsafe {
                libc::madvise(start as *mut libc::c_void, bytes as usize, libc::MADV_DONTNEED);
            },
        }
    }

    /// Whether an address lies in this zone, live or not.
    pub fn contains(&self, address: u64) -> bool {
        self.chunks.iter().any(|chunk| (chunk.base..chunk.base + chunk.len).contains(&address))
    }
}

impl Drop for Zone {
    fn drop(&mut self) {
        for &Chunk { base, len, .. } in &self.chunks {
            // SAFETY: the range was mapped by `grow` and is unmapped once; the machine is gone, and with it every promise
            // about its pointers.
            unsafe { libc::munmap(base as *mut libc::c_void, len as usize) };
        }
    }
}

fn map_reserved(len: u64) -> Option<u64> {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
    // SAFETY: a fresh anonymous mapping at an address the kernel chooses touches nothing that exists.
    let base = unsafe { libc::mmap(std::ptr::null_mut(), len as usize, libc::PROT_NONE, flags, -1, 0) };
    if base == libc::MAP_FAILED {
        return None;
    }
    // SAFETY: the range was just mapped. Huge pages would turn one written byte into 2 MiB of real memory.
    unsafe { libc::madvise(base, len as usize, libc::MADV_NOHUGEPAGE) };
    Some(base as u64)
}

/// Maps a part of a file over a range of a zone that is reserved and without access.
pub(crate) fn map_file(start: u64, bytes: u64, file: i32, offset: u64, access: i32) -> Step<()> {
    let flags = libc::MAP_SHARED | libc::MAP_FIXED | libc::MAP_NORESERVE;
    // SAFETY: callers pass a range that they hold reserved: nothing else is there.
    let at =
        unsafe { libc::mmap(start as *mut libc::c_void, bytes as usize, access, flags, file, offset as libc::off_t) };
    if at == libc::MAP_FAILED {
        let why = std::io::Error::last_os_error();
        return Err(fail(Code::OUT_OF_MEMORY, format!("the host cannot map {bytes} bytes: {why}")));
    }
    Ok(())
}

/// Makes a range of a private zone reserved again, after [`map_file`].
pub(crate) fn unmap_file(start: u64, bytes: u64) {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE | libc::MAP_FIXED;
    // SAFETY: the range is the caller's, inside a zone.
    unsafe {
        libc::mmap(start as *mut libc::c_void, bytes as usize, libc::PROT_NONE, flags, -1, 0);
        libc::madvise(start as *mut libc::c_void, bytes as usize, libc::MADV_NOHUGEPAGE);
    }
}

/// Sets the access to whole pages of a zone.
pub(crate) fn protect(start: u64, bytes: u64, access: i32) -> Step<()> {
    // SAFETY: callers pass whole pages of a zone's own mapping.
    let result = unsafe { libc::mprotect(start as *mut libc::c_void, bytes as usize, access) };
    if result == 0 {
        return Ok(());
    }
    let why = std::io::Error::last_os_error();
    Err(fail(Code::OUT_OF_MEMORY, format!("the host refused {bytes} bytes of address space: {why}")))
}

/// Copies bytes; the ranges may overlap.
///
/// # Safety
/// Both ranges are mapped, the source readable and the destination writable.
pub(crate) unsafe fn copy(dst: u64, src: u64, bytes: u64) {
    // SAFETY: by this function's own contract.
    unsafe { std::ptr::copy(src as *const u8, dst as *mut u8, bytes as usize) };
}

/// Writes `count` elements of `width` bytes (1, 2 or 4). `zone` is the zone that the range lies in, if it does: zeros are
/// then made by giving pages back.
///
/// # Safety
/// The range is mapped and writable.
pub(crate) unsafe fn fill(dst: u64, value: u32, width: u8, count: u64, zone: Option<&Zone>) {
    let bytes = count * u64::from(width);
    let [low, second, ..] = value.to_ne_bytes();
    let uniform = match width {
        1 => true,
        2 => low == second,
        _ => value.to_ne_bytes().iter().all(|&byte| byte == low),
    };
    if let (true, Some(zone)) = (uniform && low == 0 && bytes >= DROP_PAGES_FROM, zone) {
        let first = (dst + zone.page - 1) & !(zone.page - 1);
        let last = ((dst + bytes) & !(zone.page - 1)).max(first);
        let (head, tail) = ((first - dst).min(bytes), (dst + bytes).saturating_sub(last));
        // SAFETY: the head and the tail lie inside the range.
        unsafe {
            std::ptr::write_bytes(dst as *mut u8, 0, head as usize);
            std::ptr::write_bytes(last as *mut u8, 0, tail as usize);
        }
        zone.drop_pages(first, last - first);
        return;
    }
    if uniform {
        // SAFETY: by this function's own contract.
        unsafe { std::ptr::write_bytes(dst as *mut u8, low, bytes as usize) };
        return;
    }
    // Copies of one block: element by element takes ten times as long.
    let mut block = [0_u8; 4096];
    let used = bytes.min(block.len() as u64) as usize;
    for element in block[..used].chunks_exact_mut(usize::from(width)) {
        match width {
            2 => element.copy_from_slice(&(value as u16).to_ne_bytes()),
            _ => element.copy_from_slice(&value.to_ne_bytes()),
        }
    }
    let mut done = 0;
    while done < bytes {
        let length = (bytes - done).min(used as u64);
        // SAFETY: the bytes lie inside the range, by this function's own contract; the block is elsewhere.
        unsafe { std::ptr::copy_nonoverlapping(block.as_ptr(), (dst + done) as *mut u8, length as usize) };
        done += length;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn freed_addresses_come_back_late_and_empty() {
        late_and_empty(Zone::new(1 << 21, page(), 64 << 21));
        late_and_empty(Zone::shared(1 << 21, page(), 64 << 21));
    }

    fn late_and_empty(mut zone: Zone) {
        let first = zone.take(1 << 21).unwrap();
        assert_eq!(first % (1 << 21), 0);
        // SAFETY: a live range of the zone.
        unsafe { fill(first, 7, 1, 1 << 21, Some(&zone)) };
        zone.give(first, 1 << 21);
        let mut seen = 0;
        for _ in 0..64 {
            let next = zone.take(1 << 21).unwrap();
            seen += 1;
            if next == first {
                // SAFETY: a live range of the zone.
                assert_eq!(unsafe { *(next as *const u8) }, 0);
                break;
            }
            zone.give(next, 1 << 21);
        }
        assert!(seen > 32, "came back after {seen}");
    }

    #[test]
    fn a_big_reservation_costs_nothing() {
        let mut zone = Zone::new(1 << 21, page(), 1 << 36);
        let a = zone.take(576 << 30).unwrap();
        // SAFETY: the last byte of a live range.
        unsafe { fill(a + (576 << 30) - 1, 1, 1, 1, Some(&zone)) };
        zone.give(a, 576 << 30);
        assert!(zone.rounded(u64::MAX).is_err() && zone.rounded(1 << 63).is_err());
    }

    #[test]
    fn patterns() {
        for page in [page(), 64 << 10] {
            patterns_in(Zone::new(page, page, 1 << 20));
            patterns_in(Zone::shared(page, page, 1 << 20));
        }
    }

    fn patterns_in(mut zone: Zone) {
        let at = zone.take(1 << 18).unwrap();
        // SAFETY: all inside a live range of the zone.
        unsafe {
            fill(at, 0x0102_0304, 4, 3, Some(&zone));
            assert_eq!(std::ptr::read_unaligned((at + 8) as *const u32), 0x0102_0304);
            fill(at + 1, 0xABCD, 2, 5, Some(&zone));
            assert_eq!(std::ptr::read_unaligned((at + 9) as *const u16), 0xABCD);
            fill(at, 0xFF, 1, 1 << 18, Some(&zone));
            fill(at + 3, 0, 1, (1 << 18) - 5, Some(&zone));
            assert_eq!([*((at + 2) as *const u8), *((at + 3) as *const u8)], [0xFF, 0]);
            assert_eq!([*((at + (1 << 18) - 3) as *const u8), *((at + (1 << 18) - 2) as *const u8)], [0, 0xFF]);
            // Long enough to drop pages, and without a whole page of 64 KiB in it.
            fill(at, 0xFF, 1, 1 << 18, Some(&zone));
            fill(at + (32 << 10), 0, 1, DROP_PAGES_FROM, Some(&zone));
            let around = [(32 << 10) - 1, 32 << 10, (64 << 10) - 1, 64 << 10, (96 << 10) - 1, 96 << 10];
            assert_eq!(around.map(|offset| *((at + offset) as *const u8)), [0xFF, 0, 0, 0, 0, 0xFF]);
        }
    }
}
