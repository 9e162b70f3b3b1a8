//! The machine with a real GPU, used only where the environment asks for it.

use std::ffi::{CStr, c_uint, c_void};
use std::ptr::null_mut;
use std::sync::Arc;

use cudarc::driver::sys;
use parking_lot::{Mutex, MutexGuard};
use torch_uvm::driver::cuda::CudaDriver;
use torch_uvm::driver::{CaptureMode, DevicePtr, Driver, DriverError, ErrorKind, Range, Result, Stream};

use super::machine::{Capture, DEVICE, Gate, MANAGED_BUDGET, Machine, MachineExt};

/// Set to `cuda` to run the suite on the GPU.
const VARIABLE: &str = "TORCH_UVM_CONTRACT";

/// One test at a time: a capture in global mode forbids calls to every other thread, and the memory budget is for all.
static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

/// The first device, through the CUDA driver API.
pub struct RealMachine {
    driver: Arc<CudaDriver>,
    has_numa_locations: bool,
    context: usize,
    _turn: MutexGuard<'static, ()>,
}

impl RealMachine {
    /// The GPU, where the environment asks for it, with a driver that uses nothing newer than this version of CUDA.
    pub fn if_wanted(version: i32) -> Option<Self> {
        if std::env::var_os(VARIABLE).is_none_or(|value| value != "cuda") {
            eprintln!("not run: set {VARIABLE}=cuda to run the contract on the first GPU");
            return None;
        }
        let turn = ONE_AT_A_TIME.lock();
        let driver = Arc::new(CudaDriver::load_at_most(version).unwrap());
        let memory = driver.device_memory(DEVICE).unwrap();
        assert!(
            memory.free / 4 > MANAGED_BUDGET,
            "the suite holds up to {MANAGED_BUDGET} bytes of managed memory, and must stay below a quarter of what the \
             GPU has free; free are {} bytes",
            memory.free
        );
        let mut context = null_mut();
        // SAFETY: writable; the driver has initialised CUDA. Given back when the machine goes.
        check("cuDevicePrimaryCtxRetain", unsafe { sys::cuDevicePrimaryCtxRetain(&raw mut context, DEVICE) }).unwrap();
        let has_numa_locations = driver.version().unwrap().min(version) >= 12020;
        Some(Self { driver, has_numa_locations, context: context as usize, _turn: turn })
    }

    /// Runs `body` with the primary context current.
    fn in_context<T>(&self, body: impl FnOnce() -> T) -> T {
        let before = current();
        set_current(self.context);
        let result = body();
        set_current(before);
        result
    }
}

impl Drop for RealMachine {
    fn drop(&mut self) {
        // SAFETY: retained once by this machine; the driver's own retain keeps the context alive.
        let released = check("cuDevicePrimaryCtxRelease", unsafe { sys::cuDevicePrimaryCtxRelease_v2(DEVICE) });
        if !std::thread::panicking() {
            released.unwrap();
        }
    }
}

fn current() -> usize {
    let mut context = null_mut();
    // SAFETY: writable.
    check("cuCtxGetCurrent", unsafe { sys::cuCtxGetCurrent(&raw mut context) }).unwrap();
    context as usize
}

fn set_current(context: usize) {
    // SAFETY: a live context, or none.
    check("cuCtxSetCurrent", unsafe { sys::cuCtxSetCurrent(context as sys::CUcontext) }).unwrap();
}

fn check(call: &'static str, result: sys::CUresult) -> Result<()> {
    if result == sys::CUresult::CUDA_SUCCESS {
        return Ok(());
    }
    let kind = ErrorKind::Other;
    Err(DriverError { kind, call, code: result as i32, name: format!("{result:?}"), message: String::new() })
}

/// Adds 1 to each of some 32-bit words.
const ADD_ONE: &CStr = c"
.version 7.0
.target sm_75
.address_size 64
.visible .entry add_one(.param .u64 at, .param .u32 words)
{
    .reg .pred %p<2>;
    .reg .b32 %r<6>;
    .reg .b64 %d<4>;
    ld.param.u64 %d1, [at];
    ld.param.u32 %r1, [words];
    mov.u32 %r2, %ctaid.x;
    mov.u32 %r3, %ntid.x;
    mov.u32 %r4, %tid.x;
    mad.lo.s32 %r5, %r2, %r3, %r4;
    setp.ge.u32 %p1, %r5, %r1;
    @%p1 bra DONE;
    cvta.to.global.u64 %d2, %d1;
    mul.wide.u32 %d3, %r5, 4;
    add.s64 %d2, %d2, %d3;
    ld.global.u32 %r4, [%d2];
    add.u32 %r4, %r4, 1;
    st.global.u32 [%d2], %r4;
DONE:
    ret;
}
";

/// What a gate is on a real stream: a host function that waits.
unsafe extern "C" fn wait_for_gate(gate: *mut c_void) {
    // SAFETY: made by `queue_gate` for this one call.
    unsafe { Box::from_raw(gate.cast::<Gate>()) }.wait();
}

impl Machine for RealMachine {
    fn driver(&self) -> &dyn Driver {
        &*self.driver
    }

    fn shared_driver(&self) -> Arc<dyn Driver> {
        self.driver.clone()
    }

    fn is_real(&self) -> bool {
        true
    }

    fn has_numa_locations(&self) -> bool {
        self.has_numa_locations
    }

    fn begin_capture(&self, stream: Stream, mode: CaptureMode) -> Result<()> {
        use sys::CUstreamCaptureMode_enum as Mode;
        let mode = match mode {
            CaptureMode::Global => Mode::CU_STREAM_CAPTURE_MODE_GLOBAL,
            CaptureMode::ThreadLocal => Mode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL,
            CaptureMode::Relaxed => Mode::CU_STREAM_CAPTURE_MODE_RELAXED,
        };
        self.in_context(|| {
            // SAFETY: a live stream.
            check("cuStreamBeginCapture", unsafe { sys::cuStreamBeginCapture_v2(stream.0 as _, mode) })
        })
    }

    fn end_capture(&self, stream: Stream) -> Result<()> {
        let mut graph = null_mut();
        self.in_context(|| {
            // SAFETY: a live stream; writable.
            check("cuStreamEndCapture", unsafe { sys::cuStreamEndCapture(stream.0 as _, &raw mut graph) })?;
            // SAFETY: a graph that nobody else has.
            check("cuGraphDestroy", unsafe { sys::cuGraphDestroy(graph) })
        })
    }

    fn capture_status(&self, stream: Stream) -> Result<Capture> {
        use sys::CUstreamCaptureStatus_enum as Status;
        let mut status = Status::CU_STREAM_CAPTURE_STATUS_NONE;
        self.in_context(|| {
            // SAFETY: a live stream; writable.
            check("cuStreamIsCapturing", unsafe { sys::cuStreamIsCapturing(stream.0 as _, &raw mut status) })
        })?;
        Ok(match status {
            Status::CU_STREAM_CAPTURE_STATUS_NONE => Capture::None,
            Status::CU_STREAM_CAPTURE_STATUS_ACTIVE => Capture::Active,
            Status::CU_STREAM_CAPTURE_STATUS_INVALIDATED => Capture::Invalidated,
        })
    }

    fn queue_gate(&self, stream: Stream, gate: &Gate) {
        let gate = Box::into_raw(Box::new(gate.clone())).cast();
        // SAFETY: a live stream; the function takes the box and calls nothing of CUDA.
        let queued = self.in_context(|| unsafe { sys::cuLaunchHostFunc(stream.0 as _, Some(wait_for_gate), gate) });
        check("cuLaunchHostFunc", queued).unwrap();
    }

    fn try_write(&self, ptr: DevicePtr, bytes: &[u8]) -> Result<()> {
        // SAFETY: the source is readable; CUDA checks the destination.
        let copied = self.in_context(|| unsafe { sys::cuMemcpyHtoD_v2(ptr.0, bytes.as_ptr().cast(), bytes.len()) });
        check("cuMemcpyHtoD", copied)
    }

    fn read(&self, ptr: DevicePtr, bytes: &mut [u8]) {
        // SAFETY: the destination is writable; CUDA checks the source.
        let copied = self.in_context(|| unsafe { sys::cuMemcpyDtoH_v2(bytes.as_mut_ptr().cast(), ptr.0, bytes.len()) });
        check("cuMemcpyDtoH", copied).unwrap();
    }

    fn copy(&self, to: DevicePtr, from: DevicePtr, bytes: u64) {
        self.in_context(|| {
            // SAFETY: no host memory; CUDA checks the addresses.
            check("cuMemcpy", unsafe { sys::cuMemcpy(to.0, from.0, bytes as usize) }).unwrap();
            // SAFETY: no pointers. Copies between devices' addresses do not wait.
            check("cuCtxSynchronize", unsafe { sys::cuCtxSynchronize() }).unwrap();
        });
    }

    fn set(&self, ptr: DevicePtr, value: u8, bytes: u64) {
        self.in_context(|| {
            // SAFETY: no host memory; CUDA checks the address.
            check("cuMemsetD8", unsafe { sys::cuMemsetD8_v2(ptr.0, value, bytes as usize) }).unwrap();
            // SAFETY: no pointers.
            check("cuCtxSynchronize", unsafe { sys::cuCtxSynchronize() }).unwrap();
        });
    }

    fn add_one(&self, ptr: DevicePtr, words: u32) -> bool {
        let run = |ptr: DevicePtr, words: u32| {
            let (mut module, mut function) = (null_mut(), null_mut());
            let (mut address, mut count) = (ptr.0, words);
            let mut arguments = [(&raw mut address).cast::<c_void>(), (&raw mut count).cast()];
            // SAFETY: the image is a C string of PTX; the arguments are those of its kernel, which stays inside the range.
            unsafe {
                check("cuModuleLoadData", sys::cuModuleLoadData(&raw mut module, ADD_ONE.as_ptr().cast())).unwrap();
                check("cuModuleGetFunction", sys::cuModuleGetFunction(&raw mut function, module, c"add_one".as_ptr()))
                    .unwrap();
                let (blocks, list) = (words.div_ceil(256), arguments.as_mut_ptr());
                check(
                    "cuLaunchKernel",
                    sys::cuLaunchKernel(function, blocks, 1, 1, 256, 1, 1, 0, null_mut(), list, null_mut()),
                )
                .unwrap();
                check("cuCtxSynchronize", sys::cuCtxSynchronize()).unwrap();
                check("cuModuleUnload", sys::cuModuleUnload(module)).unwrap();
            }
        };
        // The library that stands in for CUDA's has kernels that do nothing.
        let known = self.driver.alloc_device(DEVICE, 4).unwrap();
        self.write(known, &[1, 0, 0, 0]);
        self.in_context(|| {
            run(known, 1);
            run(ptr, words);
        });
        let mut found = [0; 4];
        self.read(known, &mut found);
        self.driver.free(DEVICE, known).unwrap();
        found == [2, 0, 0, 0]
    }

    fn queue_kernel(&self, _stream: Stream, _range: Range) {
        unreachable!("a test that would end the context")
    }

    fn pointer_attributes(&self, ptr: DevicePtr) -> Vec<(&'static str, Result<i64>)> {
        use sys::CUpointer_attribute_enum as Attribute;
        let attributes = [
            ("MEMORY_TYPE", Attribute::CU_POINTER_ATTRIBUTE_MEMORY_TYPE),
            ("DEVICE_POINTER", Attribute::CU_POINTER_ATTRIBUTE_DEVICE_POINTER),
            ("HOST_POINTER", Attribute::CU_POINTER_ATTRIBUTE_HOST_POINTER),
            ("DEVICE_ORDINAL", Attribute::CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL),
            ("IS_MANAGED", Attribute::CU_POINTER_ATTRIBUTE_IS_MANAGED),
            ("IS_LEGACY_CUDA_IPC_CAPABLE", Attribute::CU_POINTER_ATTRIBUTE_IS_LEGACY_CUDA_IPC_CAPABLE),
            ("MAPPED", Attribute::CU_POINTER_ATTRIBUTE_MAPPED),
            ("ALLOWED_HANDLE_TYPES", Attribute::CU_POINTER_ATTRIBUTE_ALLOWED_HANDLE_TYPES),
            ("IS_GPU_DIRECT_RDMA_CAPABLE", Attribute::CU_POINTER_ATTRIBUTE_IS_GPU_DIRECT_RDMA_CAPABLE),
            ("ACCESS_FLAGS", Attribute::CU_POINTER_ATTRIBUTE_ACCESS_FLAGS),
            ("RANGE_SIZE", Attribute::CU_POINTER_ATTRIBUTE_RANGE_SIZE),
            ("MAPPING_SIZE", Attribute::CU_POINTER_ATTRIBUTE_MAPPING_SIZE),
        ];
        let ask = |attribute| {
            // As wide as the widest of them: shorter answers leave the rest zero.
            let mut value = 0i64;
            self.in_context(|| {
                // SAFETY: writable, for any of the attributes.
                check("cuPointerGetAttribute", unsafe {
                    sys::cuPointerGetAttribute((&raw mut value).cast(), attribute, ptr.0)
                })
            })?;
            Ok(value)
        };
        attributes.map(|(name, attribute)| (name, ask(attribute))).into()
    }

    fn current_context(&self) -> Option<usize> {
        Some(current())
    }

    fn with_primary_context(&self, body: &mut dyn FnMut()) {
        self.in_context(body);
    }

    fn with_foreign_context(&self, body: &mut dyn FnMut()) {
        let mut context = null_mut();
        let flags: c_uint = 0;
        // SAFETY: writable; no parameters; the device of all tests. Destroyed below.
        let made = unsafe { sys::cuCtxCreate_v4(&raw mut context, null_mut(), flags, DEVICE) };
        check("cuCtxCreate", made).unwrap();
        // Creating made it current.
        body();
        // SAFETY: made above, in use by nobody else.
        check("cuCtxDestroy", unsafe { sys::cuCtxDestroy_v2(context) }).unwrap();
    }
}
