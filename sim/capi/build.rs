//! Gives the library its SONAME, by which the stand-ins in `stubs/` name it as needed, and has the unit tests export their
//! entry points, so that they find them by name as programs do.

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rustc-cdylib-link-arg=-Wl,-soname,libtorch_uvm_sim_capi.so");
    println!("cargo:rustc-link-arg=-rdynamic");
}
