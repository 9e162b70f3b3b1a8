//! Writes a wheel from nothing: its files and what the wheel format asks for beside them.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use zip::write::SimpleFileOptions;
use zip::{CompressionMethod, ZipWriter};

use crate::repack::{WheelName, record_line};

/// A wheel that is to be written.
pub struct Wheel<'a> {
    pub name: WheelName,
    /// METADATA: headers in the core metadata format.
    pub metadata: String,
    pub entry_points: String,
    pub license: &'a Path,
    /// The files that are installed, by their path.
    pub files: BTreeMap<String, Vec<u8>>,
}

impl Wheel<'_> {
    /// Writes the wheel into the folder `out`. The same wheel is the same bytes each time.
    pub fn write(mut self, out: &Path) -> Result<PathBuf> {
        let folder = self.name.metadata_folder();
        let license = fs::read(self.license).with_context(|| format!("cannot read {}", self.license.display()))?;
        // Not pure: there is a library in it, so it goes where libraries go.
        let wheel = format!(
            "Wheel-Version: 1.0\nGenerator: torch-uvm-xtask\nRoot-Is-Purelib: false\nTag: {}\n",
            self.name.tag()
        );
        for (name, bytes) in [
            ("METADATA", self.metadata.into_bytes()),
            ("WHEEL", wheel.into_bytes()),
            ("entry_points.txt", self.entry_points.into_bytes()),
            ("licenses/LICENSE", license),
        ] {
            self.files.insert(format!("{folder}{name}"), bytes);
        }
        let record = format!("{folder}RECORD");
        let lines = self.files.iter().map(|(path, bytes)| record_line(path, bytes));
        let lines: String = lines.chain([format!("{record},,\n")]).collect();

        fs::create_dir_all(out).with_context(|| format!("cannot make the folder {}", out.display()))?;
        let result = out.join(self.name.file_name());
        // A half-written wheel must not look like a whole one.
        let draft = result.with_extension("whl.part");
        // RECORD comes last, as the format recommends.
        let members = self.files.iter().map(|(path, bytes)| (path.as_str(), bytes.as_slice()));
        write_members(members.chain([(record.as_str(), lines.as_bytes())]), &draft)
            .with_context(|| format!("cannot write {}; is the disk full?", draft.display()))?;
        fs::rename(&draft, &result).with_context(|| format!("cannot write {}", result.display()))?;
        Ok(result)
    }
}

fn write_members<'a>(members: impl Iterator<Item = (&'a str, &'a [u8])>, draft: &Path) -> Result<()> {
    let mut writer = ZipWriter::new(BufWriter::new(File::create(draft)?));
    // The time of change is the format's first day: another one each time would make another wheel each time.
    let options = SimpleFileOptions::default()
        .compression_method(CompressionMethod::Deflated)
        .last_modified_time(zip::DateTime::default())
        .unix_permissions(0o644);
    for (path, bytes) in members {
        writer.start_file(path, options)?;
        writer.write_all(bytes)?;
    }
    writer.finish()?.into_inner().map_err(io::IntoInnerError::into_error)?.sync_all()?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use zip::ZipArchive;

    use super::*;

    #[test]
    fn wheel_is_whole_and_the_same_each_time() {
        let folder = tempfile::tempdir().unwrap();
        let license = folder.path().join("LICENSE");
        fs::write(&license, "Apache").unwrap();
        let make = |out: &str| {
            let wheel = Wheel {
                name: WheelName::parse(Path::new("torch_uvm-0.1.0-py3-none-manylinux_2_28_x86_64.whl")).unwrap(),
                metadata: "Metadata-Version: 2.4\nName: torch-uvm\n".into(),
                entry_points: "[group]\na = b\n".into(),
                license: &license,
                files: BTreeMap::from([("torch_uvm/__init__.py".to_owned(), b"1\n".to_vec())]),
            };
            wheel.write(&folder.path().join(out)).unwrap()
        };
        let (first, second) = (make("1"), make("2"));
        assert_eq!(fs::read(&first).unwrap(), fs::read(second).unwrap());

        let mut archive = ZipArchive::new(File::open(first).unwrap()).unwrap();
        let mut text = |name: &str| {
            let mut text = String::new();
            archive.by_name(name).unwrap().read_to_string(&mut text).unwrap();
            text
        };
        let record = text("torch_uvm-0.1.0.dist-info/RECORD");
        let names: Vec<_> = record.lines().map(|line| line.split(',').next().unwrap()).collect();
        let info = ["METADATA", "WHEEL", "entry_points.txt", "licenses/LICENSE"];
        let info = info.map(|name| format!("torch_uvm-0.1.0.dist-info/{name}"));
        assert_eq!(names[..4], info);
        assert_eq!(names[4..], ["torch_uvm/__init__.py", "torch_uvm-0.1.0.dist-info/RECORD"]);
        // printf '1\n' | sha256sum, in URL-safe base 64
        let line = "torch_uvm/__init__.py,sha256=Q1WkaxnTSNwvV8BG-O9j1FOOu5NgAPPJ7pVKJ0YN2GU,2\n";
        assert!(record.contains(line), "{record}");
        assert!(text(&info[1]).contains("\nTag: py3-none-manylinux_2_28_x86_64\n"));
    }
}
