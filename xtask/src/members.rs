//! The part of an official wheel that the plug-in is compiled and linked against: c10's headers and libraries, 4 MB of
//! many hundreds.

use std::collections::BTreeMap;
use std::fs;
use std::io::{Read, Seek};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use sha2::{Digest, Sha256};
use zip::ZipArchive;

use crate::fingerprint::{Fingerprint, Stamp, hexadecimal};
use crate::index::Index;
use crate::paths::shown;
use crate::pins::{self, PluginRelease};
use crate::repack::WheelName;
use crate::step::Step;

pub const C10: &str = "torch/lib/libc10.so";
pub const C10_CUDA: &str = "torch/lib/libc10_cuda.so";
const FOLDERS: [&str; 2] = ["torch/include/c10/", "torch/include/torch/headeronly/"];

/// Fetches the members of the official wheel of `release` for `machine` into `folder`; what is there already is kept.
pub fn fetch(step: &Step, index: &Index, release: &PluginRelease, machine: &str, folder: &Path) -> Result<()> {
    let version = release.version;
    let Some(pinned) = release.members_for(machine) else {
        bail!(
            "no checksum of PyTorch {version} with CUDA for {machine} is pinned in xtask/src/pins.rs: the package \
             index had no such wheel, so the plug-in has no library for it there"
        );
    };
    let inputs = Fingerprint::new("members").value("sha256", pinned.sha256);
    let stamp = Stamp::new(folder.with_added_extension("stamp"), inputs);
    if stamp.is_fresh(&[&folder.join(C10), &folder.join(C10_CUDA)]) {
        step.up_to_date();
        return Ok(());
    }
    stamp.clear()?;
    let file = index.open("torch", |name| is_wheel_of(name, version, machine)).with_context(|| {
        format!("the wheel of PyTorch {version} for {} on {machine} could not be found", pins::PLUGIN_PYTHON)
    })?;
    let name = file.name();
    let mut archive = ZipArchive::new(file).with_context(|| format!("{name} is not a zip archive that can be read"))?;
    let members = read(&mut archive).with_context(|| format!("cannot read {name}"))?;
    let sum = digest(&members);
    ensure!(
        sum == pinned.sha256,
        "what the plug-in uses of {name} has SHA-256 {sum}, not {}: the index served another file",
        pinned.sha256
    );
    write(&members, folder)?;
    step.note(format_args!("{:.1} MB of {name}", archive.into_inner().fetched() as f64 / 1e6));
    stamp.write()
}

fn is_wheel_of(file: &str, version: &str, machine: &str) -> bool {
    WheelName::parse(Path::new(file)).is_ok_and(|name| {
        name.version == version
            && (name.python.as_str(), name.abi.as_str()) == (pins::PLUGIN_PYTHON, pins::PLUGIN_PYTHON)
            && name.platform.contains("linux")
            && name.platform.ends_with(machine)
    })
}

/// The members that are used, by name.
fn read<R: Read + Seek>(archive: &mut ZipArchive<R>) -> Result<BTreeMap<String, Vec<u8>>> {
    let names: Vec<_> =
        archive.file_names().map(|name| name.map(|name| name.into_owned())).collect::<Result<_, _>>()?;
    let used = |name: &String| {
        let header = FOLDERS.iter().any(|folder| name.starts_with(folder)) && !name.ends_with('/');
        header || name == C10 || name == C10_CUDA
    };
    let mut members = BTreeMap::new();
    for name in names.into_iter().filter(used) {
        let mut bytes = Vec::new();
        let mut member = archive.by_name(&name)?;
        ensure!(member.enclosed_name().is_some(), "the member {name} would lie outside of the folder");
        member.read_to_end(&mut bytes).with_context(|| format!("cannot read the member {name}"))?;
        drop(member);
        members.insert(name, bytes);
    }
    ensure!(members.contains_key(C10_CUDA), "it holds no {C10_CUDA}: it is a wheel without CUDA");
    Ok(members)
}

/// SHA-256 over every member in the order of their names: the name's length, the name, the length, the bytes; lengths as
/// 64-bit little-endian numbers.
pub fn digest(members: &BTreeMap<String, Vec<u8>>) -> String {
    let mut hasher = Sha256::new();
    for part in members.iter().flat_map(|(name, bytes)| [name.as_bytes(), bytes]) {
        hasher.update((part.len() as u64).to_le_bytes());
        hasher.update(part);
    }
    hexadecimal(&hasher.finalize())
}

fn write(members: &BTreeMap<String, Vec<u8>>, folder: &Path) -> Result<()> {
    if folder.exists() {
        fs::remove_dir_all(folder).with_context(|| format!("cannot remove the old {}", shown(folder)))?;
    }
    for (name, bytes) in members {
        let file: PathBuf = folder.join(name);
        let parent = file.parent().unwrap_or(folder);
        fs::create_dir_all(parent).with_context(|| format!("cannot make the folder {}", shown(parent)))?;
        fs::write(&file, bytes).with_context(|| format!("cannot write {}", shown(&file)))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::io::{Cursor, Write};

    use zip::ZipWriter;
    use zip::write::SimpleFileOptions;

    use super::*;

    fn wheel(members: &[(&str, &str)]) -> ZipArchive<Cursor<Vec<u8>>> {
        let mut writer = ZipWriter::new(Cursor::new(Vec::new()));
        for (name, text) in members {
            writer.start_file(*name, SimpleFileOptions::default()).unwrap();
            writer.write_all(text.as_bytes()).unwrap();
        }
        ZipArchive::new(writer.finish().unwrap()).unwrap()
    }

    #[test]
    fn only_what_is_used_is_read() {
        let mut archive = wheel(&[
            (C10_CUDA, "cuda"),
            (C10, "c10"),
            ("torch/lib/libtorch_cuda.so", "huge"),
            ("torch/include/ATen/ATen.h", "aten"),
            ("torch/include/torch/headeronly/macros/Macros.h", "macros"),
            ("torch/include/c10/cuda/CUDAGuard.h", "guard"),
        ]);
        let members = read(&mut archive).unwrap();
        let names: Vec<_> = members.keys().map(String::as_str).collect();
        let expected =
            ["torch/include/c10/cuda/CUDAGuard.h", "torch/include/torch/headeronly/macros/Macros.h", C10, C10_CUDA];
        assert_eq!(names, expected);
        let folder = tempfile::tempdir().unwrap();
        write(&members, &folder.path().join("torch-2")).unwrap();
        assert_eq!(fs::read_to_string(folder.path().join("torch-2").join(C10)).unwrap(), "c10");
        let error = read(&mut wheel(&[(C10, "c10")])).unwrap_err().to_string();
        assert!(error.contains("without CUDA"), "{error}");
    }

    #[test]
    fn digest_tells_names_from_bytes() {
        let members = |all: &[(&str, &str)]| {
            all.iter().map(|(name, bytes)| (name.to_string(), bytes.as_bytes().to_vec())).collect::<BTreeMap<_, _>>()
        };
        assert_ne!(digest(&members(&[("a", "bc")])), digest(&members(&[("ab", "c")])));
        // sha256sum of the 18 bytes that the definition gives
        let known = "cf6ab613e3942391f88ed698557e1680f160bd10e88c6b668c50360c10930e2b";
        assert_eq!(digest(&members(&[("a", "b")])), known);
    }

    #[test]
    fn wheels_are_told_by_their_names() {
        let name = "torch-2.11.0-cp311-cp311-manylinux_2_28_x86_64.whl";
        assert!(is_wheel_of(name, "2.11.0", "x86_64"));
        assert!(is_wheel_of("torch-2.6.0-cp311-cp311-manylinux1_x86_64.whl", "2.6.0", "x86_64"));
        assert!(!is_wheel_of(name, "2.11.0", "aarch64"));
        assert!(!is_wheel_of(name, "2.1.0", "x86_64"));
        assert!(!is_wheel_of("torch-2.11.0-cp313-cp313t-manylinux_2_28_x86_64.whl", "2.11.0", "x86_64"));
        assert!(!is_wheel_of("torch-2.11.0-cp311-none-macosx_11_0_arm64.whl", "2.11.0", "arm64"));
    }
}
