//! `cargo xtask wheel`: the official wheel with its `libc10_cuda.so` rebuilt, our allocator inside (the *overlay*).
//!
//! Only that one library is compiled, against the wheel's own headers and `libc10.so`: minutes, not hours, and no CUDA
//! compiler. PyTorch's own (patched) `c10/cuda/CMakeLists.txt` does the building, as in a whole build of PyTorch;
//! `cmake/overlay` only stands in for what surrounds it.

use std::collections::BTreeSet;
use std::env;
use std::fs::{self, File};
use std::io::{self, BufReader};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use zip::ZipArchive;

use crate::build_tools;
use crate::c_api;
use crate::cuda::Cuda;
use crate::elf::Library;
use crate::exports::{self, User};
use crate::fingerprint::{Fingerprint, Stamp, sha256_of};
use crate::manylinux;
use crate::members::{C10, C10_CUDA};
use crate::official;
use crate::package;
use crate::paths::{self, shown};
use crate::pins::{self, TorchRelease};
use crate::process;
use crate::python::{Python, Venv};
use crate::repack::{self, WheelName};
use crate::source;
use crate::step::{Step, Steps};
use crate::toolchain::Machine;
use crate::tools;
use crate::tree;

/// What is asked for.
pub struct Request {
    pub release: &'static TorchRelease,
    /// PyTorch's source, if not Debian's.
    pub source: Option<PathBuf>,
    /// The official wheel, if not the package index's.
    pub official: Option<PathBuf>,
    /// Where the new wheel goes.
    pub out: PathBuf,
    /// Rebuild the sources as they are: shows what the toolchain alone changes.
    pub unpatched: bool,
}

impl Request {
    /// The patched wheel of `release`, everything else as usual.
    pub fn usual(release: &'static TorchRelease) -> Self {
        Self { release, source: None, official: None, out: paths::wheels(), unpatched: false }
    }
}

/// What was made.
pub struct Overlay {
    pub wheel: PathBuf,
    pub python: Python,
    /// The unpatched source.
    pub source: PathBuf,
    /// Folders with the CUDA headers that PyTorch's own headers include.
    pub cuda_include: Vec<PathBuf>,
}

/// Folders of one overlay: one for each release and Python.
struct Folders {
    base: PathBuf,
    official: PathBuf,
}

impl Folders {
    fn new(request: &Request, python: &Python) -> Self {
        let name = format!("{}-{}", request.release.version(), python.tag);
        let kind = if request.unpatched { "unpatched" } else { "uvm" };
        let overlay = paths::target().join("overlay");
        // The official wheel is the same for both kinds.
        Self { base: overlay.join(format!("{kind}-{name}")), official: overlay.join(format!("official-{name}")) }
    }

    /// Members of the official wheel that are compiled and linked against.
    fn official(&self) -> PathBuf {
        self.official.clone()
    }

    /// The sources that are compiled.
    fn sources(&self) -> PathBuf {
        self.base.join("sources")
    }

    fn build(&self) -> PathBuf {
        self.base.join("build")
    }

    fn stamp(&self, step: &str) -> PathBuf {
        self.base.join("stamps").join(step)
    }
}

/// Makes the overlay wheel. Steps whose inputs did not change are skipped.
pub fn make(request: &Request) -> Result<Overlay> {
    tools::require(&tools::for_wheel())?;
    let release = request.release;
    let python = Python::find(Some(&release.official))?;
    let steps = Steps::new("wheel");
    let folders = Folders::new(request, &python);

    let venv = steps.run("prepare pip, CMake and Ninja", |step| build_tools::prepare(step, &python))?;
    let official = match &request.official {
        Some(file) => file.clone(),
        None => steps.run(format!("fetch the official wheel of PyTorch {}", release.version()), |step| {
            official::fetch(step, &venv, &release.official, &python)
                .context("no wheel to begin with; one with CUDA that you trust can be passed with --official FILE")
        })?,
    };
    let source = source::fetch(&steps, release, request.source.as_deref())?;
    let users = steps
        .run("unpack headers and libraries of the official wheel", |step| unpack_official(step, &official, &folders))?;
    let cuda = steps.run("fetch the CUDA headers", |step| Cuda::fetch(step, &venv, release.cuda, Machine::own()?))?;
    steps.run(if request.unpatched { "copy the sources" } else { "patch the sources" }, |step| {
        prepare_sources(step, request, &source, &folders)
    })?;
    let library = steps.run("compile libc10_cuda.so", |step| compile(step, release, &venv, &folders, &cuda))?;
    let name = steps.run("check libc10_cuda.so against the official one", |step| {
        check(step, request, &official, &library, &users, &folders)
    })?;
    let wheel = steps.run("write the wheel", |step| {
        let result = request.out.join(name.file_name());
        let inputs = Fingerprint::new("wheel 1").big_file(&official)?.file(&library)?;
        let inputs = inputs.value("result", &result.to_string_lossy());
        let stamp = Stamp::new(folders.stamp("wheel"), inputs);
        if stamp.is_fresh(&[&result]) {
            step.up_to_date();
            return Ok(result);
        }
        stamp.clear()?;
        let result = repack::repack(&official, &name, &[(C10_CUDA, &library)], &request.out)?;
        stamp.write()?;
        Ok(result)
    })?;
    steps.finish(shown(&wheel));
    let cuda_include = cuda.include;
    Ok(Overlay { wheel, python, source, cuda_include })
}

/// Unpacks what is compiled and linked against, and notes what every other library of the wheel takes from elsewhere.
fn unpack_official(step: &Step, official: &Path, folders: &Folders) -> Result<Vec<User>> {
    let folder = folders.official();
    let notes = folder.join("imports.txt");
    let stamp = Stamp::new(folder.with_added_extension("stamp"), Fingerprint::new("official 1").big_file(official)?);
    if stamp.is_fresh(&[&folder.join(C10), &folder.join(C10_CUDA), &notes]) {
        step.up_to_date();
        return read_imports(&notes);
    }
    stamp.clear()?;
    if folder.exists() {
        fs::remove_dir_all(&folder).with_context(|| format!("cannot remove the old {}", shown(&folder)))?;
    }
    let file = File::open(official).with_context(|| format!("cannot read {}", official.display()))?;
    let mut archive = ZipArchive::new(BufReader::new(file))
        .with_context(|| format!("{} is not a zip archive that can be read", official.display()))?;
    ensure!(
        archive.index_for_name(C10_CUDA).is_some(),
        "{} holds no {C10_CUDA}: it is a wheel without CUDA; pass one with CUDA with --official FILE",
        official.display()
    );
    let mut text = String::new();
    for index in 0..archive.len() {
        let mut member = archive.by_index(index).context("cannot read the wheel's contents")?;
        let Some(path) = member.enclosed_name() else { continue };
        let name = path.to_string_lossy().into_owned();
        let is_library = name.ends_with(".so") || name.contains(".so.");
        if !member.is_file() || !(is_library || name.starts_with("torch/include/")) {
            continue;
        }
        let target = folder.join(&path);
        let mut unpack = || -> io::Result<()> {
            fs::create_dir_all(target.parent().unwrap_or(&folder))?;
            io::copy(&mut member, &mut File::create(&target)?)?;
            Ok(())
        };
        unpack().with_context(|| format!("cannot unpack {name} of the wheel to {}", shown(&target)))?;
        if is_library && name != C10_CUDA {
            let library = Library::read(&target)?;
            text += &name;
            for word in library.imports.iter().chain(&library.needed_versions) {
                text += " ";
                text += word;
            }
            text += "\n";
            if name != C10 {
                // Gigabytes that nothing else here needs.
                fs::remove_file(&target).with_context(|| format!("cannot remove {}", shown(&target)))?;
            }
        }
    }
    fs::write(&notes, text).with_context(|| format!("cannot write {}", shown(&notes)))?;
    stamp.write()?;
    read_imports(&notes)
}

/// One line for each library: its name, the symbols and the symbol versions it needs.
fn read_imports(notes: &Path) -> Result<Vec<User>> {
    let text = fs::read_to_string(notes).with_context(|| format!("cannot read {}", shown(notes)))?;
    let user = |line: &str| {
        let mut words = line.split(' ').map(str::to_owned);
        User { name: words.next().unwrap_or_default(), imports: words.collect() }
    };
    Ok(text.lines().map(user).collect())
}

/// Brings together the sources that `libc10_cuda` is made of, patched, in a small tree of their own.
fn prepare_sources(step: &Step, request: &Request, source: &Path, folders: &Folders) -> Result<()> {
    let draft = folders.base.join("sources.draft");
    if draft.exists() {
        fs::remove_dir_all(&draft).with_context(|| format!("cannot remove the old {}", shown(&draft)))?;
    }
    let patch = (!request.unpatched).then(|| paths::root().join(request.release.patch));
    let mut parts = BTreeSet::from(["c10/cuda".to_owned(), "cmake/public/utils.cmake".to_owned()]);
    if let Some(patch) = &patch {
        let text = fs::read_to_string(patch).with_context(|| format!("cannot read the patch {}", shown(patch)))?;
        parts.extend(patched_files(&text));
    }
    for part in &parts {
        tree::copy(&source.join(part), &draft.join(part))?;
    }
    check_headers(&draft, &folders.official())?;
    if let Some(patch) = &patch {
        apply(patch, &draft)?;
    }
    // PyTorch's own would look for NVIDIA's compiler.
    tree::copy(&paths::root().join("cmake/overlay/cuda.cmake"), &draft.join("cmake/public/cuda.cmake"))?;
    // Files that stay the same keep their time, and Ninja leaves them alone.
    if tree::sync(&draft, &folders.sources())? == 0 {
        step.up_to_date();
    }
    fs::remove_dir_all(&draft).with_context(|| format!("cannot remove {}", shown(&draft)))
}

/// The files that a patch changes (not those it adds).
fn patched_files(patch: &str) -> Vec<String> {
    let strip =
        |path: &str| path.split('\t').next().and_then(|path| path.split_once('/')).map(|(_, rest)| rest.to_owned());
    patch
        .lines()
        .filter_map(|line| line.strip_prefix("--- "))
        .filter(|path| !path.starts_with("/dev/null"))
        .filter_map(strip)
        .collect()
}

/// An error unless the source's headers of `c10/cuda` are those that the wheel was built with.
fn check_headers(sources: &Path, official: &Path) -> Result<()> {
    let folder = Path::new("c10/cuda");
    for header in tree::files(&sources.join(folder))? {
        if header.extension().is_none_or(|extension| extension != "h") {
            continue;
        }
        let ours = sources.join(folder).join(&header);
        let theirs = official.join("torch/include").join(folder).join(&header);
        if !theirs.exists() {
            continue; // not every header is installed
        }
        let read = |path: &Path| fs::read(path).with_context(|| format!("cannot read {}", path.display()));
        ensure!(
            read(&ours)? == read(&theirs)?,
            "{} differs from the wheel's own: this source is not what the wheel was built from",
            folder.join(&header).display()
        );
    }
    Ok(())
}

/// Applies a patch, once a dry run has shown that all of it applies.
pub fn apply(patch: &Path, tree: &Path) -> Result<()> {
    let command = |more: &[&str]| {
        let mut command = Command::new("sh");
        // `patch` speaks of what fails on its standard output.
        command.args(["-c", "patch -p1 --batch --forward --no-backup-if-mismatch \"$@\" >&2", "patch"]).args(more);
        command.arg("-i").arg(patch).current_dir(tree);
        command
    };
    process::capture(&mut command(&["--dry-run"]))
        .and_then(|_| process::capture(&mut command(&[])))
        .with_context(|| format!("{} does not apply to this source of PyTorch", shown(patch)))?;
    Ok(())
}

fn compile(step: &Step, release: &TorchRelease, venv: &Venv, folders: &Folders, cuda: &Cuda) -> Result<PathBuf> {
    let official = folders.official();
    let c10 = official.join(C10);
    let abi = Library::read(&c10)?.cxx11_abi("c10").with_context(|| format!("cannot use {}", shown(&c10)))?;
    let run_path = Library::read(&official.join(C10_CUDA))?.run_path;
    let build = folders.build();
    let result = build.join("lib/libc10_cuda.so");
    let before = result.exists().then(|| sha256_of(&result)).transpose()?;

    let define = |name: &str, value: &str| format!("-D{name}={value}");
    let mut configure = Command::new(venv.program("cmake"));
    configure
        .args(["-G", "Ninja", "-S"])
        .arg(paths::root().join("cmake/overlay"))
        .arg("-B")
        .arg(&build)
        .arg(define("CMAKE_MAKE_PROGRAM", &venv.program("ninja").to_string_lossy()))
        .arg("-DCMAKE_BUILD_TYPE=Release")
        .arg(define("OVERLAY_SOURCES", &folders.sources().to_string_lossy()))
        .arg(define("OVERLAY_TORCH", &official.join("torch").to_string_lossy()))
        .arg(define("OVERLAY_CUDA_INCLUDE", &cuda.include_list()))
        .arg(define("OVERLAY_CUDA_RUNTIME", &cuda.runtime_library.to_string_lossy()))
        .arg(define("OVERLAY_RUN_PATH", &run_path))
        .arg(define("GLIBCXX_USE_CXX11_ABI", if abi { "1" } else { "0" }))
        .arg(define("TORCH_UVM_CARGO_DIR", &paths::bridge().to_string_lossy()))
        .arg(define("TORCH_UVM_TORCH_VERSION", &pins::version_number(release.version())?.to_string()));
    for command in [&mut configure, Command::new(venv.program("cmake")).arg("--build").arg(&build)] {
        command.env("USE_RUST_UVM", "1").env("TORCH_UVM_ROOT", paths::root()).env("CARGO_TARGET_DIR", paths::target());
        let log = folders.base.join(if command.get_args().any(|word| word == "--build") {
            "build.log"
        } else {
            "configure.log"
        });
        process::run_logged(command, &log)?;
    }
    ensure!(result.exists(), "the build ended well but made no {}", shown(&result));
    if before.is_some_and(|sum| sha256_of(&result).is_ok_and(|now| now == sum)) {
        step.up_to_date();
    }
    Ok(result)
}

/// Checks that the rebuilt library can take the official one's place, and gives the name of the wheel it goes into.
fn check(
    step: &Step,
    request: &Request,
    official: &Path,
    library: &Path,
    users: &[User],
    folders: &Folders,
) -> Result<WheelName> {
    let theirs = Library::read(&folders.official().join(C10_CUDA))?;
    let ours = Library::read(library)?;
    exports::check(&theirs, &ours, users, &standard_library()?)
        .with_context(|| format!("{} cannot be used", shown(library)))?;
    if !request.unpatched {
        c_api::check(&ours, c_api::Home::Both).with_context(|| format!("{} cannot be used", shown(library)))?;
    }
    ensure!(
        theirs.run_path == ours.run_path,
        "{} has the run path {}, the official one has {}",
        shown(library),
        ours.run_path,
        theirs.run_path
    );

    let mut name = WheelName::parse(official)?;
    let rest = users.iter().flat_map(|user| user.imports.iter().cloned());
    let all =
        Library { needed_versions: ours.needed_versions.iter().cloned().chain(rest).collect(), ..Library::default() };
    let base = manylinux::oldest_glibc(&all)?;
    let machine = name.platform.split_once("x86_64").map_or("aarch64", |_| "x86_64");
    name.platform = manylinux::platform(base, machine);
    let release = request.release.version();
    let kind = if request.unpatched { "unpatched" } else { "uvm" };
    name.version = format!("{release}+{kind}.{}", package::version()?);
    step.note(format_args!("needs glibc {}.{} or newer: {}", base.0, base.1, name.file_name()));
    Ok(name)
}

/// The C++ standard library that the compiler links.
fn standard_library() -> Result<Library> {
    let compiler = env::var_os("CXX").unwrap_or_else(|| tools::CXX.program.into());
    let path = process::capture(Command::new(compiler).arg("-print-file-name=libstdc++.so.6"))?;
    Library::read(Path::new(path.trim())).context("cannot look into the compiler's C++ standard library")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patched_files_are_those_that_exist_before() {
        let patch = "--- a/CMakeLists.txt\t2025\n+++ b/CMakeLists.txt\n@@\n--- /dev/null\n+++ b/c10/cuda/RustUvm.h\n\
                     --- a/c10/cuda/CUDAAllocatorConfig.cpp\n";
        assert_eq!(patched_files(patch), ["CMakeLists.txt", "c10/cuda/CUDAAllocatorConfig.cpp"]);
    }

    #[test]
    fn foreign_headers_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        let (sources, official) = (folder.path().join("s"), folder.path().join("o"));
        let put = |path: PathBuf, text: &str| {
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        };
        put(sources.join("c10/cuda/impl/CUDATest.h"), "1");
        put(sources.join("c10/cuda/only_in_source.h"), "1");
        put(official.join("torch/include/c10/cuda/impl/CUDATest.h"), "1");
        check_headers(&sources, &official).unwrap();
        put(sources.join("c10/cuda/impl/CUDATest.h"), "2");
        let error = check_headers(&sources, &official).unwrap_err().to_string();
        assert!(error.contains("impl/CUDATest.h"), "{error}");
    }

    #[test]
    fn patch_that_does_not_apply_is_named() {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("file"), "one\ntwo\n").unwrap();
        let patch = folder.path().join("a.patch");
        fs::write(&patch, "--- a/file\n+++ b/file\n@@ -1,2 +1,2 @@\n one\n-two\n+2\n").unwrap();
        apply(&patch, folder.path()).unwrap();
        assert_eq!(fs::read_to_string(folder.path().join("file")).unwrap(), "one\n2\n");
        let error = format!("{:#}", apply(&patch, folder.path()).unwrap_err());
        assert!(error.contains("a.patch") && error.contains("--dry-run"), "{error}");
    }
}
