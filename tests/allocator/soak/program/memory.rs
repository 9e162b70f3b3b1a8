//! Allocating, using and freeing memory.

use super::Program;
use super::random::mix;
use super::tensor::Tensor;
use crate::world::MIB;
use torch_uvm::driver::{DeviceIndex, DevicePtr, Stream};
use torch_uvm::error::Error;
use torch_uvm::ids::{DEFAULT_POOL, MempoolId};

impl Program {
    pub(super) fn allocate(&mut self) -> Option<()> {
        let device = self.device();
        let held: u64 = self.live.iter().filter(|tensor| tensor.device == device).map(|tensor| tensor.bytes).sum();
        if held > self.wanted[device as usize] || self.live.len() > 250 {
            return self.free_one();
        }
        let (bytes, stream) = (self.size(), self.stream(device));
        let tensor = self.new_tensor(device, bytes, stream)?;
        self.live.push(tensor);
        Some(())
    }

    pub(super) fn new_tensor(&mut self, device: DeviceIndex, bytes: u64, stream: Stream) -> Option<Tensor> {
        let result = self.call(|program| program.world.allocator.allocate(device, bytes, stream, None));
        let ptr = self.expect(result, &[])?;
        let pool = self.pool_of(device);
        let mut tensor = self.tensor(ptr, bytes, device, stream, pool);
        self.fill(&mut tensor);
        Some(tensor)
    }

    pub(super) fn tensor(
        &mut self,
        ptr: DevicePtr,
        bytes: u64,
        device: DeviceIndex,
        stream: Stream,
        pool: Option<MempoolId>,
    ) -> Tensor {
        assert!(ptr.0.is_multiple_of(512), "{ptr:?}");
        self.next_tag = self.next_tag.wrapping_add(1);
        let thread = self.traits.shared.as_ref().map_or(0, |&(thread, _)| thread as u32);
        Tensor {
            ptr,
            bytes,
            device,
            stream,
            // No byte of it is 0, and no two neighbours are alike.
            tag: 0x0101_0101 + (mix(u64::from(self.next_tag) << 8 | u64::from(thread)) as u32 & 0x7E7E_7E7E),
            full: bytes <= 64 << 10 || self.random.one_in(16),
            written: false,
            elsewhere: false,
            pool,
            graph: None,
            keeps: self.random.one_in(8),
        }
    }

    /// Writes a tensor's bytes on its stream.
    pub(super) fn fill(&self, tensor: &mut Tensor) {
        let &mut Tensor { ptr, bytes, device, stream, tag, .. } = tensor;
        let machine = &self.world.machine;
        for (offset, length) in tensor.chunks() {
            let words = length / 4;
            if words > 0 {
                machine.memset_async(device, ptr.0 + offset, tag, 4, words, stream).expect("memset of words");
            }
            let rest = (offset + words * 4).max(bytes & !3)..offset + length;
            if !rest.is_empty() {
                let (at, count) = (ptr.0 + rest.start, rest.end - rest.start);
                machine.memset_async(device, at, tag & 0xFF, 1, count, stream).expect("memset of bytes");
            }
        }
        tensor.written = true;
    }

    pub(super) fn free_one(&mut self) -> Option<()> {
        let all = self.random.one_in(64);
        let index = self.pick(|tensor| all || !tensor.keeps)?;
        let tensor = self.live.swap_remove(index);
        if tensor.written && self.random.one_in(2) {
            self.copy_late(&tensor, tensor.device, tensor.stream);
        }
        self.free(tensor);
        Some(())
    }

    pub(super) fn free(&mut self, tensor: Tensor) {
        let result = self.call(|program| program.world.allocator.free(tensor.ptr, None));
        result.unwrap_or_else(|error| panic!("free of {tensor:?}: {error}"));
        if self.freed.len() == 16 {
            self.freed.remove(0);
        }
        self.freed.push(tensor);
    }

    pub(super) fn use_elsewhere(&mut self) -> Option<()> {
        let index = self.pick(|tensor| tensor.written)?;
        let tensor = self.live[index];
        // Now and then on another device.
        let device = if self.random.one_in(8) { self.device() } else { tensor.device };
        let stream = self.stream(device);
        self.order((tensor.device, tensor.stream), (device, stream));
        self.copy_late(&tensor, device, stream);
        self.world.allocator.record_stream(tensor.ptr, device, stream).expect("record_stream");
        self.live[index].elsewhere = true;
        Some(())
    }

    pub(super) fn rewrite(&mut self) -> Option<()> {
        let index = self.pick(|tensor| tensor.graph.is_none() && !tensor.elsewhere)?;
        let Tensor { ptr, bytes, device, stream, pool, .. } = self.live[index];
        let mut tensor = self.tensor(ptr, bytes, device, stream, pool);
        self.fill(&mut tensor);
        self.live[index] = tensor;
        Some(())
    }

    pub(super) fn empty_cache(&mut self) -> Option<()> {
        let result = self.call(|program| program.world.allocator.empty_cache(DEFAULT_POOL, None));
        self.expect(result, &[])?;
        if self.alone() {
            self.nothing_is_cached();
        }
        Some(())
    }

    pub(super) fn ask_too_much(&mut self) -> Option<()> {
        let device = self.device();
        let stream = self.stream(device);
        let bytes = *self.random.of(&[2 << 30, 16 << 30, 1 << 60, u64::MAX]);
        let result = self.call(|program| program.world.allocator.allocate(device, bytes, stream, None));
        match &result {
            Ok(ptr) => panic!("{bytes} bytes at {ptr:?}"),
            Err(Error::OutOfMemory(_)) if bytes < 1 << 60 && self.alone() => {
                // Only one device was asked.
                if self.devices == 1 {
                    self.nothing_is_cached();
                }
            }
            Err(_) => {}
        }
        self.expect(result, &[]);
        Some(())
    }

    /// The same size again and again: what a thread's cache is for.
    pub(super) fn burst(&mut self) -> Option<()> {
        let device = self.device();
        let stream = self.stream(device);
        // The large ones make time pass for what lives long.
        let large = self.random.one_in(3);
        let bytes = if large { self.random.between(2 * MIB, 8 * MIB) } else { self.size().min(2 * MIB) };
        for _ in 0..self.random.between(2, 24) {
            let mut tensor = self.new_tensor(device, bytes, stream)?;
            if self.random.one_in(8) {
                self.verify(&tensor);
            }
            if self.random.one_in(16) {
                tensor.elsewhere = false;
                self.live.push(tensor);
            } else {
                self.world.allocator.free(tensor.ptr, None).expect("free");
            }
        }
        Some(())
    }

    pub(super) fn free_twice(&mut self) -> Option<()> {
        let gone = *self.freed.last()?;
        let at = gone.ptr.0;
        let taken = self.live.iter().chain(self.hoard.lock().iter()).any(|tensor| tensor.ptr.0 == at);
        if taken {
            return None;
        }
        assert_eq!(self.world.allocator.free(gone.ptr, None), Err(Error::InvalidPointer(gone.ptr)));
        assert!(self.world.allocator.record_stream(gone.ptr, 0, Stream(0)).is_err());
        Some(())
    }

    pub(super) fn allocate_at(&mut self) -> Option<()> {
        if self.freed.is_empty() {
            return None;
        }
        let gone = *self.random.of(&self.freed);
        let bytes = if self.random.one_in(2) { gone.bytes } else { self.random.between(1, gone.bytes + 1) };
        let Tensor { device, stream, .. } = gone;
        let address = gone.ptr.0 + (self.random.below(3) * 512).min(gone.bytes - bytes) / 512 * 512;
        let result = self.call(|program| program.world.allocator.allocate_at(device, address, bytes, stream, None));
        let ptr = self.expect(result, &["are free at"])?;
        assert_eq!(ptr.0, address);
        let pool = self.pool_of(device);
        let mut tensor = self.tensor(ptr, bytes, device, stream, pool);
        self.fill(&mut tensor);
        self.live.push(tensor);
        Some(())
    }
}
