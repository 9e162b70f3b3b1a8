//! Gives the library its SONAME, by which the stand-ins in `stubs/` name it as needed.

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rustc-cdylib-link-arg=-Wl,-soname,libtorch_uvm_sim_capi.so");
}
