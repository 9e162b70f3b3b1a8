//! What a shared library offers, needs and says about itself.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::path::Path;

use anyhow::{Context, Result, bail};
use object::elf::{
    DT_NEEDED, DT_RPATH, DT_RUNPATH, DT_SONAME, FileHeader64, PT_LOAD, ProgramHeader64, STB_GNU_UNIQUE, STT_OBJECT,
    STT_TLS,
};
use object::read::elf::{Dyn, ElfFile, ProgramHeader};
use object::{Endianness, Object, ObjectSymbol, ReadCache};

/// A shared library's dynamic symbols, the libraries and symbol versions it needs, and its run path.
#[derive(Debug, Default)]
pub struct Library {
    /// Symbols it defines for others; the value says whether others may define the same (weak and unique symbols).
    pub exports: BTreeMap<String, bool>,
    /// Symbols that some other library has to define.
    pub imports: BTreeSet<String>,
    /// The libraries that are loaded with it, by the names it knows them by (`libc.so.6`).
    pub needed: BTreeSet<String>,
    /// Versions it needs of its libraries, such as `GLIBC_2.34`.
    pub needed_versions: BTreeSet<String>,
    /// The name that others need it by; empty if it has none.
    pub soname: String,
    /// The folders in which it looks for its libraries, joined by colons.
    pub run_path: String,
    /// The least alignment of a segment that is loaded, in bytes: kernels with larger pages cannot map it.
    pub alignment: u64,
}

impl Library {
    pub fn read(path: &Path) -> Result<Self> {
        let file = File::open(path).with_context(|| format!("cannot read {}", path.display()))?;
        // Only what is looked at is read: libtorch_cuda.so has 900 MB.
        let cache = ReadCache::new(file);
        Self::parse(&cache).with_context(|| format!("{} is not a shared library that can be read", path.display()))
    }

    fn parse(data: &ReadCache<File>) -> Result<Self> {
        let elf = ElfFile::<FileHeader64<Endianness>, _>::parse(data)?;
        let endian = elf.endian();
        let mut library = Self { alignment: alignment(&elf)?, ..Self::default() };
        for symbol in elf.dynamic_symbols() {
            let name = symbol.name()?;
            if name.is_empty() {
                continue;
            }
            if symbol.is_undefined() {
                library.imports.insert(name.to_owned());
            } else if symbol.is_global() {
                let unique = symbol.elf_symbol().st_bind() == STB_GNU_UNIQUE;
                library.exports.insert(name.to_owned(), symbol.is_weak() || unique);
            }
        }
        let sections = elf.elf_section_table();
        if let Some((needs, link)) = sections.gnu_verneed(endian, elf.data())? {
            let strings = sections.strings(endian, elf.data(), link)?;
            for need in needs {
                for version in need?.1 {
                    let version = version?;
                    let name = strings
                        .get(version.vna_name.get(endian))
                        .map_err(|()| anyhow::anyhow!("a needed version has no name"))?;
                    library.needed_versions.insert(String::from_utf8_lossy(name).into_owned());
                }
            }
        }
        if let Some((entries, link)) = sections.dynamic(endian, elf.data())? {
            let strings = sections.strings(endian, elf.data(), link)?;
            for entry in entries {
                let tag = entry.tag(endian);
                if ![DT_NEEDED, DT_RPATH, DT_RUNPATH, DT_SONAME].contains(&tag) {
                    continue;
                }
                let text = strings
                    .get(u32::try_from(entry.val(endian))?)
                    .map_err(|()| anyhow::anyhow!("an entry of its dynamic section has no text"))?;
                let text = String::from_utf8_lossy(text).into_owned();
                if tag == DT_NEEDED {
                    library.needed.insert(text);
                } else if tag == DT_SONAME {
                    library.soname = text;
                } else {
                    library.run_path = text;
                }
            }
        }
        Ok(library)
    }

    /// An error unless it can be loaded by a kernel whose pages are of `page` bytes.
    pub fn check_alignment(&self, page: u64) -> Result<()> {
        if self.alignment < page {
            bail!(
                "its segments are aligned to {} KiB, and kernels with pages of {} KiB cannot map it: link it with \
                 -Wl,-z,max-page-size={page}",
                self.alignment >> 10,
                page >> 10
            );
        }
        Ok(())
    }

    /// The newest version needed under `prefix` (`GLIBC_`, `GLIBCXX_`), as numbers.
    pub fn newest_needed(&self, prefix: &str) -> Option<Vec<u32>> {
        newest(self.needed_versions.iter().map(String::as_str), prefix)
    }

    /// The value of `_GLIBCXX_USE_CXX11_ABI` that a C++ library was built with, told from how its own functions' names
    /// spell `std::string`.
    pub fn cxx11_abi(&self, namespace: &str) -> Result<bool> {
        // _ZN3c10… and _ZNK3c10…: functions of the namespace itself, not the templates of std that it instantiates.
        let mangled = format!("{}{namespace}", namespace.len());
        let own = |name: &&String| {
            let rest = name.strip_prefix("_ZN");
            rest.is_some_and(|rest| rest.trim_start_matches('K').starts_with(&mangled))
        };
        let new = self.exports.keys().filter(own).any(|name| name.contains("NSt7__cxx1112basic_string"));
        let old = self.exports.keys().filter(own).any(|name| name.contains("RKSs") || name.ends_with("Ss"));
        match (old, new) {
            (true, false) => Ok(false),
            (false, true) => Ok(true),
            (true, true) => bail!("its functions take std::string of both libstdc++ ABIs"),
            (false, false) => bail!("none of its functions takes a std::string, so its libstdc++ ABI cannot be told"),
        }
    }
}

/// The largest power of two to which all loaded segments are aligned, as they say and as they lie: an address and its place
/// in the file must differ by whole pages.
fn alignment<'a>(elf: &ElfFile<'a, FileHeader64<Endianness>, &'a ReadCache<File>>) -> Result<u64> {
    let endian = elf.endian();
    let loaded = elf.elf_program_headers().iter().filter(|segment| segment.p_type(endian) == PT_LOAD);
    let aligned = |segment: &ProgramHeader64<Endianness>| {
        let apart = segment.p_vaddr(endian).abs_diff(segment.p_offset(endian));
        let lies = if apart == 0 { u64::MAX } else { 1 << apart.trailing_zeros() };
        segment.p_align(endian).min(lies)
    };
    loaded.map(aligned).min().context("it has no segment that is loaded")
}

/// What kind of thing a symbol names.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    Function,
    Object,
    ThreadLocal,
}

/// A symbol that a shared library defines, at one of its versions.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Definition {
    pub name: String,
    /// Such as `GLIBC_2.14`; none in a library without versions.
    pub version: Option<String>,
    /// Whether this is the version that a program linked today is given.
    pub default: bool,
    pub kind: Kind,
    /// In bytes.
    pub size: u64,
}

/// Every symbol that the library `path` defines for others, at every version.
pub fn definitions(path: &Path) -> Result<Vec<Definition>> {
    let file = File::open(path).with_context(|| format!("cannot read {}", path.display()))?;
    let cache = ReadCache::new(file);
    read_definitions(&cache).with_context(|| format!("{} is not a shared library that can be read", path.display()))
}

fn read_definitions(data: &ReadCache<File>) -> Result<Vec<Definition>> {
    let elf = ElfFile::<FileHeader64<Endianness>, _>::parse(data)?;
    let endian = elf.endian();
    let versions = elf.elf_section_table().versions(endian, elf.data())?;
    let mut all = Vec::new();
    for symbol in elf.dynamic_symbols() {
        if symbol.is_undefined() || !symbol.is_global() {
            continue;
        }
        let mut definition = Definition {
            name: symbol.name()?.to_owned(),
            version: None,
            default: true,
            kind: match symbol.elf_symbol().st_type() {
                STT_TLS => Kind::ThreadLocal,
                STT_OBJECT => Kind::Object,
                _ => Kind::Function,
            },
            size: symbol.size(),
        };
        if let Some(versions) = &versions {
            let index = versions.version_index(endian, symbol.index());
            definition.default = !index.is_hidden();
            let version = versions.version(index.index())?;
            definition.version = version.map(|version| String::from_utf8_lossy(version.name()).into_owned());
        }
        // The versions themselves are symbols too.
        if definition.version.as_ref() != Some(&definition.name) {
            all.push(definition);
        }
    }
    Ok(all)
}

fn newest<'a>(versions: impl Iterator<Item = &'a str>, prefix: &str) -> Option<Vec<u32>> {
    versions
        .filter_map(|version| version.strip_prefix(prefix))
        .filter_map(|version| version.split('.').map(|part| part.parse().ok()).collect::<Option<Vec<u32>>>())
        .max()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn exporting(names: &[&str]) -> Library {
        Library { exports: names.iter().map(|name| (name.to_string(), false)).collect(), ..Library::default() }
    }

    #[test]
    fn abi_is_told_from_the_librarys_own_functions() {
        let old = exporting(&["_ZN3c105ErrorC1ENS_14SourceLocationESs", "_ZNSt7__cxx1112basic_stringIcE5eraseEv"]);
        assert!(!old.cxx11_abi("c10").unwrap());
        let new =
            exporting(&["_ZN3c105ErrorC1ENS_14SourceLocationENSt7__cxx1112basic_stringIcSt11char_traitsIcESaIcEEE"]);
        assert!(new.cxx11_abi("c10").unwrap());
        assert!(exporting(&["_ZN3c104initEv"]).cxx11_abi("c10").is_err());
    }

    #[test]
    fn newest_version_is_by_number() {
        let versions = ["GLIBC_2.4", "GLIBC_2.34", "GLIBC_2.2.5", "GLIBCXX_3.4.30", "GLIBC_PRIVATE"];
        assert_eq!(newest(versions.into_iter(), "GLIBC_"), Some(vec![2, 34]));
        assert_eq!(newest(versions.into_iter(), "GLIBCXX_"), Some(vec![3, 4, 30]));
        assert_eq!(newest(versions.into_iter(), "CUDA_"), None);
    }

    #[test]
    fn reads_a_library_that_a_compiler_made() {
        let folder = tempfile::tempdir().unwrap();
        let source = folder.path().join("a.c");
        let library = folder.path().join("liba.so");
        std::fs::write(
            &source,
            "#include <stdlib.h>\nvoid *ours(void) { return malloc(1); }\n__attribute__((weak)) void soft(void) {}\n",
        )
        .unwrap();
        let cc = std::process::Command::new("cc")
            .args(["-shared", "-fPIC", "-Wl,-rpath,$ORIGIN/x:$ORIGIN", "-o"])
            .args([&library, &source])
            .status();
        assert!(cc.unwrap().success());
        let read = Library::read(&library).unwrap();
        assert_eq!(read.exports.get("ours"), Some(&false));
        assert_eq!(read.exports.get("soft"), Some(&true));
        assert!(read.imports.contains("malloc"));
        assert_eq!(read.run_path, "$ORIGIN/x:$ORIGIN");
        assert!(read.newest_needed("GLIBC_").is_some());
        assert!(Library::read(&source).is_err());
    }

    #[test]
    fn alignment_is_that_of_the_worst_segment() {
        let folder = tempfile::tempdir().unwrap();
        let source = folder.path().join("a.c");
        std::fs::write(&source, "int changes = 1; int ours(void) { return changes; }\n").unwrap();
        for (page, fits) in [(4 << 10, false), (64 << 10, true)] {
            let library = folder.path().join("liba.so");
            let cc = std::process::Command::new("cc")
                .args(["-shared", "-fPIC", &format!("-Wl,-z,max-page-size={page}"), "-o"])
                .args([&library, &source])
                .status();
            assert!(cc.unwrap().success());
            let read = Library::read(&library).unwrap();
            assert_eq!(read.alignment, page);
            assert_eq!(read.check_alignment(64 << 10).is_ok(), fits);
        }
    }
}
