//! Libraries to link against that offer what a manylinux platform has, and nothing newer.
//!
//! A symbol gets the newest version there is where it is linked: linked on a system of today, a library needs that
//! system's glibc, although nearly everything it uses has been there for decades under an older version. The system's
//! own libraries say which: they carry all old versions still. So *stand-ins* are made of them here that define the same
//! symbols, each at the newest version within the platform's limits. They hold no code and are linked against only.
//!
//! What the platform has not at all is left out, so using it is an error when linking; but what is missing of libstdc++
//! may come from its static library, as in Red Hat's toolsets, and of glibc from `cmake/plugin/glibc.cpp`.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};

use crate::elf::{self, Definition, Kind, Library};
use crate::fingerprint::{Fingerprint, Stamp};
use crate::manylinux::{self, Glibc, Limits};
use crate::paths::shown;
use crate::process;
use crate::step::Step;
use crate::toolchain::{Machine, Toolchain};

/// What stands in for the compiler's own choice of libraries.
pub struct PlatformLibraries {
    /// In the order in which they are linked.
    pub link: Vec<PathBuf>,
    /// The names that a library linked against them may need.
    pub sonames: BTreeSet<String>,
}

/// The system's libraries by the names the compiler finds them by, each but the dynamic linker's.
const LIBSTDCXX: &str = "libstdc++.so.6";
const LIBC: &str = "libc.so.6";
const OTHERS: [&str; 2] = ["libm.so.6", "libgcc_s.so.1"];

/// Makes the stand-ins in `folder`; what is there already is kept.
pub fn prepare(step: &Step, folder: &Path, glibc: Glibc, toolchain: &Toolchain) -> Result<PlatformLibraries> {
    let limits = Limits::of(glibc)?;
    let loader = match toolchain.machine {
        Machine::X86_64 => "ld-linux-x86-64.so.2",
        Machine::Aarch64 => "ld-linux-aarch64.so.1",
    };
    let mut originals = Vec::new();
    for name in [LIBSTDCXX, LIBC, loader].iter().chain(&OTHERS) {
        originals.push(compilers_file(toolchain, name)?);
    }
    let archives = (compilers_file(toolchain, "libstdc++.a")?, compilers_file(toolchain, "libgcc.a")?);

    let mut inputs = Fingerprint::new("platform libraries 1").value("limits", &format!("{limits:?}"));
    for original in &originals {
        inputs = inputs.file(original)?;
    }
    let stamp = Stamp::new(folder.with_added_extension("stamp"), inputs);
    if stamp.is_fresh(&[folder]) {
        step.up_to_date();
    } else {
        stamp.clear()?;
        if folder.exists() {
            fs::remove_dir_all(folder).with_context(|| format!("cannot remove the old {}", shown(folder)))?;
        }
        fs::create_dir_all(folder).with_context(|| format!("cannot make the folder {}", shown(folder)))?;
        for original in &originals {
            let soname = Library::read(original)?.soname;
            for (name, symbols) in split(&soname, choose(elf::definitions(original)?, &limits)) {
                make(toolchain, &folder.join(&name), &name, &symbols)?;
            }
        }
        stamp.write()?;
    }

    // Those that serve others come last. Of libstdc++ and libgcc what the stand-ins lack is taken from the archives.
    let mut link = vec![folder.join(LIBSTDCXX), archives.0];
    link.extend(OTHERS.map(|name| folder.join(name)));
    link.push(archives.1);
    link.extend([LIBC].iter().chain(&MERGED.map(|(name, _)| name)).map(|name| folder.join(name)));
    link.push(folder.join(loader));
    link.retain(|file| file.exists());
    let name = |file: &PathBuf| file.file_name().map(|name| name.to_string_lossy().into_owned());
    let sonames = link.iter().filter_map(name).filter(|name| !name.ends_with(".a")).collect();
    Ok(PlatformLibraries { link, sonames })
}

/// Where the compiler finds a library.
pub fn compilers_file(toolchain: &Toolchain, name: &str) -> Result<PathBuf> {
    let compiler = toolchain.cxx();
    let answer = process::capture(Command::new(compiler).arg(format!("-print-file-name={name}")))?;
    let path = PathBuf::from(answer.trim());
    // A file it does not find it answers with the bare name.
    ensure!(path.is_absolute() && path.exists(), "{} finds no {name}", compiler.to_string_lossy());
    Ok(path)
}

/// For each symbol that can be linked to today its newest version within the limits.
fn choose(definitions: Vec<Definition>, limits: &Limits) -> Vec<Chosen> {
    let mut names: BTreeMap<String, Vec<Definition>> = BTreeMap::new();
    for definition in definitions {
        names.entry(definition.name.clone()).or_default().push(definition);
    }
    let mut chosen = Vec::new();
    for definitions in names.into_values() {
        // Without a default version the symbol is there for old programs only.
        let Some(today) = definitions.iter().find(|definition| definition.default).cloned() else { continue };
        let allowed = |definition: &Definition| definition.version.as_deref().is_some_and(|v| limits.allow(v));
        let mut allowed: Vec<_> = definitions.into_iter().filter(allowed).collect();
        allowed.sort_by_key(|definition| (definition.default, version_order(definition)));
        if let Some(definition) = allowed.pop() {
            chosen.push(Chosen { newer: definition != today, definition });
        }
    }
    chosen
}

fn version_order(definition: &Definition) -> Option<Vec<u32>> {
    let version = definition.version.as_deref()?;
    manylinux::numbers(version.rsplit_once('_').map_or(version, |(_, numbers)| numbers))
}

struct Chosen {
    definition: Definition,
    /// Whether there is a newer version, outside the limits.
    newer: bool,
}

/// The libraries that glibc 2.34 made part of libc, and what their symbols begin with.
const MERGED: [(&str, &[&str]); 3] = [
    ("libpthread.so.0", &["pthread_", "__pthread_", "sem_", "thrd_", "mtx_", "cnd_", "tss_", "call_once"]),
    ("libdl.so.2", &["dl"]),
    ("librt.so.1", &["aio_", "lio_", "mq_", "shm_", "timer_"]),
];

/// The symbols by the library that has them on the platform: up to glibc 2.33 libc had companions. A symbol that moved
/// got a new version, which is how it is told from one that was in libc all along.
fn split(soname: &str, symbols: Vec<Chosen>) -> BTreeMap<String, Vec<Definition>> {
    let mut libraries: BTreeMap<String, Vec<Definition>> = BTreeMap::new();
    for Chosen { definition, newer } in symbols {
        let begins = |prefixes: &[&str]| prefixes.iter().any(|prefix| definition.name.starts_with(prefix));
        let companion = MERGED.iter().find(|(_, prefixes)| newer && soname == LIBC && begins(prefixes));
        let home = companion.map_or(soname, |(name, _)| name);
        libraries.entry(home.to_owned()).or_default().push(definition);
    }
    libraries
}

/// Links a library without code that defines the symbols.
fn make(toolchain: &Toolchain, library: &Path, soname: &str, symbols: &[Definition]) -> Result<()> {
    let write = |extension: &str, text: String| -> Result<PathBuf> {
        let file = library.with_added_extension(extension);
        fs::write(&file, text).with_context(|| format!("cannot write {}", shown(&file)))?;
        Ok(file)
    };
    let source = write("s", assembly(symbols))?;
    let versions = write("map", version_script(symbols))?;
    let mut command = Command::new(toolchain.cxx());
    command.args(["-shared", "-nostdlib", "-o"]).arg(library).arg(&source);
    command.arg(format!("-Wl,-soname,{soname}")).arg(format!("-Wl,--version-script={}", versions.display()));
    process::capture(&mut command).with_context(|| format!("cannot make a stand-in for {soname}"))?;
    Ok(())
}

fn assembly(symbols: &[Definition]) -> String {
    let mut text = ".section .note.GNU-stack,\"\",%progbits\n".to_owned();
    for Definition { name, kind, size, .. } in symbols {
        let (section, kind) = match kind {
            Kind::Function => (".text", "function"),
            Kind::Object => (".bss", "object"),
            Kind::ThreadLocal => (".section .tbss,\"awT\",%nobits", "tls_object"),
        };
        // A function needs no room: nobody calls it.
        let room = if kind == "function" { 0 } else { *size };
        // Writing to a String does not fail.
        let _ = write!(text, "{section}\n.globl {name}\n.type {name}, %{kind}\n.size {name}, {room}\n{name}:\n");
        if room > 0 {
            let _ = writeln!(text, ".zero {room}");
        }
    }
    text
}

fn version_script(symbols: &[Definition]) -> String {
    let mut versions: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for symbol in symbols {
        versions.entry(symbol.version.as_deref().unwrap_or_default()).or_default().push(&symbol.name);
    }
    let node = |(version, names): (&str, Vec<&str>)| format!("{version} {{ global: {}; }};\n", names.join("; "));
    versions.into_iter().map(node).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn definition(name: &str, version: &str, default: bool) -> Definition {
        let version = Some(version.to_owned());
        Definition { name: name.into(), version, default, kind: Kind::Function, size: 8 }
    }

    fn chosen(definitions: Vec<Definition>) -> Vec<String> {
        let chosen = choose(definitions, &Limits::of((2, 28)).unwrap());
        let shown = |c: &Chosen| format!("{}@{}", c.definition.name, c.definition.version.as_deref().unwrap());
        chosen.iter().map(shown).collect()
    }

    #[test]
    fn newest_version_within_the_limits_is_chosen() {
        let memcpy = vec![definition("memcpy", "GLIBC_2.2.5", false), definition("memcpy", "GLIBC_2.14", true)];
        assert_eq!(chosen(memcpy), ["memcpy@GLIBC_2.14"]);
        let dlsym = vec![definition("dlsym", "GLIBC_2.34", true), definition("dlsym", "GLIBC_2.2.5", false)];
        assert_eq!(chosen(dlsym), ["dlsym@GLIBC_2.2.5"]);
        let timer = ["GLIBC_2.2.5", "GLIBC_2.3.3"].map(|version| definition("timer_create", version, false));
        let timer = timer.into_iter().chain([definition("timer_create", "GLIBC_2.34", true)]);
        assert_eq!(chosen(timer.collect()), ["timer_create@GLIBC_2.3.3"]);
    }

    #[test]
    fn what_the_platform_lacks_is_left_out() {
        assert!(chosen(vec![definition("stat64", "GLIBC_2.33", true)]).is_empty());
        assert!(chosen(vec![definition("secret", "GLIBC_PRIVATE", true)]).is_empty());
        assert!(chosen(vec![definition("for_old_programs", "GLIBC_2.2.5", false)]).is_empty());
    }

    #[test]
    fn moved_symbols_go_home() {
        let all = ["dlsym", "pthread_create", "stat"].map(|name| definition(name, "GLIBC_2.2.5", false));
        let moved = all.map(|definition| Chosen { definition, newer: true });
        let stayed = Chosen { definition: definition("pthread_self", "GLIBC_2.2.5", true), newer: false };
        let libraries = split(LIBC, moved.into_iter().chain([stayed]).collect());
        let names = |library: &str| libraries[library].iter().map(|d| d.name.as_str()).collect::<Vec<_>>();
        assert_eq!(names("libdl.so.2"), ["dlsym"]);
        assert_eq!(names("libpthread.so.0"), ["pthread_create"]);
        assert_eq!(names(LIBC), ["stat", "pthread_self"]);
    }

    /// A library linked against the stand-ins needs nothing newer, a symbol that the platform lacks is an error, and
    /// the archive of libstdc++ fills in.
    #[test]
    fn linking_keeps_to_the_platform() {
        let folder = tempfile::tempdir().unwrap();
        let toolchain = Toolchain::native().unwrap();
        let steps = crate::step::Steps::new("test");
        let libraries =
            steps.run("stand-ins", |step| prepare(step, &folder.path().join("lib"), (2, 28), &toolchain)).unwrap();
        let link = |source: &str| {
            let file = folder.path().join("a.cpp");
            fs::write(&file, source).unwrap();
            let result = folder.path().join("liba.so");
            let mut command = Command::new("g++");
            command.args(["-shared", "-fPIC", "-nodefaultlibs", "-Wl,-z,defs", "-Wl,--as-needed", "-o"]);
            command.args([&result, &file]).arg("-Wl,--exclude-libs,ALL").args(&libraries.link);
            process::capture(&mut command).and_then(|_| Library::read(&result))
        };
        let library = link(
            "#include <condition_variable>\n#include <cstring>\n#include <dlfcn.h>\n#include <mutex>\n#include <new>\n\
             #include <pthread.h>\n#include <string>\n\
             std::string s(const char *t) { return std::string(t) + (const char *)dlsym(nullptr, t); }\n\
             void w(std::condition_variable &c, std::unique_lock<std::mutex> &l) { c.wait(l); }\n\
             void *n(int k) { return new int[k]; }\n\
             void j(pthread_t t) { pthread_join(t, nullptr); }\n",
        )
        .unwrap();
        assert!(manylinux::oldest_glibc(&library).unwrap() <= (2, 28), "{:?}", library.needed_versions);
        assert!(library.needed.is_subset(&libraries.sonames), "{:?}", library.needed);
        assert!(library.needed.contains("libdl.so.2") && library.needed.contains("libpthread.so.0"));
        assert!(!library.exports.keys().any(|name| name.contains("condition_variable4wait")));
        let error = link(
            "extern \"C\" void arc4random_buf(void *, unsigned long);\nvoid f(void *p) { arc4random_buf(p, 1); }\n",
        );
        assert!(error.map(|_| ()).unwrap_err().to_string().contains("arc4random_buf"));
    }
}
