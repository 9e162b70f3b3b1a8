//! Which Linux systems a library runs on, told from the symbol versions it needs (PEP 600's manylinux platforms).

use anyhow::{Context, Result, bail};

use crate::elf::Library;

/// A version of glibc, such as (2, 28), and with it the platform `manylinux_2_28`.
pub type Glibc = (u32, u32);

/// A platform's tag in a wheel's name.
pub fn platform(glibc: Glibc, machine: &str) -> String {
    format!("manylinux_{}_{}_{machine}", glibc.0, glibc.1)
}

/// GLIBCXX_3.4.N, the CXXABI_1.3.M of the same libstdc++, and the oldest glibc of a manylinux platform that has them.
const LIBSTDCXX: &[(u32, u32, u32)] =
    &[(19, 7, 17), (22, 10, 24), (24, 11, 28), (28, 12, 31), (29, 13, 34), (30, 13, 35), (32, 14, 38), (33, 15, 39)];

/// The newest version that a library may need of each set of symbol versions.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Limits {
    limits: [(&'static str, Vec<u32>); 4],
}

impl Limits {
    /// What every system with this glibc has.
    pub fn of(glibc: Glibc) -> Result<Self> {
        let Some((glibcxx, cxxabi, _)) = LIBSTDCXX.iter().rev().find(|(_, _, base)| *base <= glibc.1) else {
            bail!("no libstdc++ of the age of glibc {}.{} is known here", glibc.0, glibc.1)
        };
        // libgcc_s has had nothing since GCC 7 but for types that C++ and Rust do not use here.
        Ok(Self {
            limits: [
                ("GLIBC_", vec![glibc.0, glibc.1]),
                ("GLIBCXX_", vec![3, 4, *glibcxx]),
                ("CXXABI_", vec![1, 3, *cxxabi]),
                ("GCC_", vec![7, 0, 0]),
            ],
        })
    }

    /// Whether a symbol version (`GLIBC_2.14`) is within the limits. Versions that are private, or none of these sets',
    /// are not.
    pub fn allow(&self, version: &str) -> bool {
        self.limits.iter().any(|(prefix, newest)| {
            let numbers = version.strip_prefix(prefix).and_then(numbers);
            numbers.is_some_and(|numbers| numbers <= *newest)
        })
    }
}

/// A version's numbers, by which versions are ordered; `None` where it is not made of numbers.
pub fn numbers(version: &str) -> Option<Vec<u32>> {
    version.split('.').map(|part| part.parse().ok()).collect()
}

/// The oldest glibc that the libraries run on. A libstdc++ of some age comes with a glibc of some age, so what they
/// need of libstdc++ counts too.
pub fn oldest_glibc(library: &Library) -> Result<Glibc> {
    let needed = library.newest_needed("GLIBC_");
    let glibc = needed.as_deref().and_then(|version| version.get(1)).context("it needs no glibc version")?;
    let mut oldest = *glibc;
    for (prefix, column) in [("GLIBCXX_", 0), ("CXXABI_", 1)] {
        let Some(version) = library.newest_needed(prefix) else { continue };
        let minor = version.get(2).copied().unwrap_or(0);
        let newest = |row: &(u32, u32, u32)| if column == 0 { row.0 } else { row.1 };
        let base = LIBSTDCXX.iter().find(|row| minor <= newest(row)).map(|row| row.2);
        let base = base.with_context(|| {
            let version: Vec<_> = version.iter().map(u32::to_string).collect();
            format!(
                "it needs {prefix}{}, newer than any manylinux platform known here: build with an older g++",
                version.join(".")
            )
        })?;
        oldest = oldest.max(base);
    }
    Ok((2, oldest))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn needing(versions: &[&str]) -> Library {
        Library { needed_versions: versions.iter().map(|version| version.to_string()).collect(), ..Library::default() }
    }

    #[test]
    fn oldest_glibc_counts_libstdcxx() {
        assert_eq!(oldest_glibc(&needing(&["GLIBC_2.34", "GLIBC_2.4", "GLIBCXX_3.4.19"])).unwrap(), (2, 34));
        assert_eq!(oldest_glibc(&needing(&["GLIBC_2.17", "GLIBCXX_3.4.29"])).unwrap(), (2, 34));
        assert_eq!(oldest_glibc(&needing(&["GLIBC_2.17", "CXXABI_1.3.11"])).unwrap(), (2, 28));
        assert_eq!(oldest_glibc(&needing(&["GLIBC_2.17", "CXXABI_1.3"])).unwrap(), (2, 17));
        assert_eq!(oldest_glibc(&needing(&["GLIBC_2.17"])).unwrap(), (2, 17));
        assert!(oldest_glibc(&needing(&["GLIBC_2.17", "GLIBCXX_3.4.99"])).is_err());
        assert!(oldest_glibc(&needing(&[])).is_err());
    }

    #[test]
    fn limits_are_by_number_and_set() {
        let limits = Limits::of((2, 28)).unwrap();
        for version in ["GLIBC_2.2.5", "GLIBC_2.28", "GLIBCXX_3.4", "GLIBCXX_3.4.24", "CXXABI_1.3.11", "GCC_3.0"] {
            assert!(limits.allow(version), "{version}");
        }
        for version in ["GLIBC_2.29", "GLIBC_PRIVATE", "GLIBCXX_3.4.25", "CXXABI_1.3.12", "GCC_12.0.0", "libx.so.1"] {
            assert!(!limits.allow(version), "{version}");
        }
        assert!(Limits::of((2, 5)).is_err());
    }
}
