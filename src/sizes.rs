//! Sizes that many layers agree on, all in bytes: `native`'s own where they have a name of c10's.

const MIB: u64 = 1 << 20;

/// Every block is a multiple of this many bytes (`kMinBlockSize`).
pub const MIN_BLOCK: u64 = 512;
/// Requests up to here are served by the small pool (`kSmallSize`).
pub const SMALL_LIMIT: u64 = MIB;
/// Small pools are populated in this step (`kSmallBuffer`); also the granule of all population and of GPU pages.
pub const SMALL_STEP: u64 = 2 * MIB;
/// Large pools are populated at least this much at a time, for requests under [`LARGE_REQUEST`], where PyTorch's
/// `large_segment_size_mb` does not say otherwise. Steps of 2 MiB run at a third of the speed.
pub const LARGE_STEP: u64 = 20 * MIB;
/// Requests from here on are populated as they are, rounded to 2 MiB (`kMinLargeAlloc`).
pub const LARGE_REQUEST: u64 = 10 * MIB;
/// Requests from here on are refused without asking anyone (c10's limit: one exbibyte).
pub const REQUEST_LIMIT: u64 = 1 << 60;

/// The next multiple of a granule.
pub fn round_up(bytes: u64, granule: u64) -> u64 {
    bytes.div_ceil(granule) * granule
}

/// A request rounded to whole blocks' granules; 0 for what no block can serve.
#[inline]
pub fn round_to_block(bytes: u64) -> u64 {
    bytes.wrapping_add(MIN_BLOCK - 1) & !(MIN_BLOCK - 1)
}

/// A size as PyTorch's messages print it (`c10::CachingDeviceAllocator::format_size`).
pub fn format_size(bytes: u64) -> String {
    const KIB: f64 = 1024.0;
    let b = bytes as f64;
    if bytes <= 1 << 10 {
        format!("{bytes} bytes")
    } else if bytes <= 1 << 20 {
        format!("{:.2} KiB", b / KIB)
    } else if bytes <= 1 << 30 {
        format!("{:.2} MiB", b / (KIB * KIB))
    } else {
        format!("{:.2} GiB", b / (KIB * KIB * KIB))
    }
}
