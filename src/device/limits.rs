//! What limits a device: the options, PyTorch's settings, and the budget that they make.

use super::refusal::Refusal;
use crate::budget::Budget;
use crate::driver::DeviceInfo;
use crate::gpu::Gpu;
use crate::options::{NativeOptions, Options};
use crate::place::{Place, Populated};
use crate::placement::Policy;
use crate::pools::Pool;

/// The limits of one device.
pub struct Limits {
    /// Our options.
    pub options: Options,
    /// PyTorch's own settings, as they are honoured.
    pub native: NativeOptions,
    /// How much may be populated where.
    pub budget: Budget,
}

/// PyTorch's settings as they are honoured. A `max_split_size` that no block reaches is none: programs that restore the
/// default (vLLM) set 17592186044415 MiB, of which PyTorch makes 2^64 - 2^20 bytes.
fn honoured(mut native: NativeOptions) -> NativeOptions {
    if native.max_split_size >= 1 << 48 {
        native.max_split_size = u64::MAX;
    }
    native
}

impl Limits {
    /// Those that the options set.
    pub fn new(info: &DeviceInfo, options: Options, native: NativeOptions) -> Self {
        Self { budget: Budget::new(info, &options), options, native: honoured(native) }
    }

    /// PyTorch's own settings, as they are now.
    pub fn set_native(&mut self, native: NativeOptions) {
        self.native = honoured(native);
    }

    /// Our options, as they are now. The fraction set by the program stays.
    pub fn set_options(&mut self, info: &DeviceInfo, options: Options) {
        let fraction = self.budget.fraction_is_set().then(|| self.budget.fraction());
        self.budget = Budget::new(info, &options);
        if let Some(fraction) = fraction {
            self.budget.set_fraction(fraction);
        }
        self.options = options;
    }

    /// The placement of a pool.
    pub fn policy(&self, pool: &Pool) -> Policy {
        Policy(pool.placement.unwrap_or(self.options.access_pattern))
    }

    /// The placement of the default pool.
    pub fn default_policy(&self) -> Policy {
        Policy(self.options.access_pattern)
    }

    /// How much of the device limit light reclamation keeps free, in bytes.
    pub fn keep_free(&self) -> u64 {
        let share = (self.options.stage1_threshold * self.budget.device_limit() as f64) as u64;
        share.max(self.options.stage1_min_bytes)
    }

    /// Whether `bytes` more may be populated in `place`.
    ///
    /// # Errors
    /// The limit that is met; the driver's.
    pub fn admit(&mut self, gpu: &Gpu, populated: &Populated, place: Place, bytes: u64) -> Result<(), Refusal> {
        let mut host = None;
        if self.budget.needs_host(populated, place, bytes) {
            let now = gpu.driver().host_memory().map_err(|error| Refusal::Failed(error.into()))?;
            self.budget.observe(populated, &now);
            host = Some(now);
        }
        self.budget.admit(populated, place, bytes, host.as_ref()).map_err(Refusal::Exceeded)
    }
}
