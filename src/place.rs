//! Where memory lies, and how much of it.

/// Where a segment's populated bytes are meant to live.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
pub enum Place {
    /// On the GPU.
    Device,
    /// In host memory, reachable from the GPU.
    Host,
    /// Wherever the driver moves them.
    Unplaced,
}

impl Place {
    /// Where pages lie that are not where their segment's place says.
    #[must_use]
    pub fn other(self) -> Self {
        match self {
            Self::Device => Self::Host,
            Self::Host => Self::Device,
            Self::Unplaced => Self::Unplaced,
        }
    }
}

/// Populated bytes of one device by where they are meant to live.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
pub struct Populated {
    /// On the GPU.
    pub device: u64,
    /// In host memory.
    pub host: u64,
    /// Wherever the driver moves them.
    pub unplaced: u64,
}

impl Populated {
    fn at(&mut self, place: Place) -> &mut u64 {
        match place {
            Place::Device => &mut self.device,
            Place::Host => &mut self.host,
            Place::Unplaced => &mut self.unplaced,
        }
    }

    /// Counts bytes in.
    pub fn add(&mut self, place: Place, bytes: u64) {
        *self.at(place) += bytes;
    }

    /// Counts bytes out.
    pub fn sub(&mut self, place: Place, bytes: u64) {
        let at = self.at(place);
        debug_assert!(*at >= bytes);
        *at -= bytes;
    }

    /// All of them.
    pub fn total(&self) -> u64 {
        self.device + self.host + self.unplaced
    }

    /// What lies in host memory at the least: what was placed there, and what the device cannot hold.
    pub fn on_host(&self, device_memory: u64) -> u64 {
        self.host + (self.device + self.unplaced).saturating_sub(device_memory)
    }
}
