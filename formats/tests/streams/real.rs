//! Stream tables, frame tables and Arrow IPC, on real recordings.
//!
//! Row counts, stamps and checksums were computed with pyarrow and numpy, stamps with Python's `Fraction`; duplicates by
//! `numpy.append(t[1:] != t[:-1], True)`, which keeps the last of equal stamps.

use std::path::Path;

use crate::data::{chain, checksum, clock_checksum, f64s, open, position, read, real};
use robocache_formats::{Dataset, Layout, ReadError, StreamKind, TimeError};
use robocache_types::{Clock, DType, Interp};

/// Stream, rows stored, rows of distinct stamps, first and last stamp (ns), checksums of values and of stamps.
type Fact = (&'static str, usize, usize, i64, i64, u64, u64);

#[rustfmt::skip]
const COMMA: [Fact; 16] = [
    ("camera_frame_pose", 1200, 1200, 46408547498000, 46468496658000, 0xe8c23510cdc5b3ab, 0xa03a59d343e78eb8),
    ("can_radar", 10100, 6163, 46408587651843, 46468539143310, 0x34b56570b05255f3, 0xa3984d4ed020343f),
    ("can_raw_can", 135468, 84966, 46408584930395, 46468577629821, 0x0000079cfa8d4d24, 0xd6183cb37d651b20),
    ("can_speed", 4974, 4974, 46408589502843, 46468577616904, 0xbfb4b7d27d9989fc, 0x4bedaaf04349d053),
    ("can_steering_angle", 4974, 4974, 46408584958854, 46468572208977, 0x08dd33333391d481, 0x4bed2f3132f00598),
    ("can_wheel_speed", 4974, 4974, 46408589502843, 46468577616904, 0x18cb5d27d9f8465f, 0x4bedaaf04349d053),
    ("gnss_live_gnss_qcom", 30, 30, 46410296848124, 46468297115133, 0x06c3a32406274ed0, 0x009484d8aec97b16),
    ("gnss_live_gnss_ublox", 579, 579, 46408654976041, 46468382483571, 0xe35f6698ca2aec3f, 0xd81913d9e679f73d),
    ("gnss_raw_gnss_qcom", 600, 60, 46408651304531, 46467650438498, 0xaf5554e009b8bc51, 0x02520fa3fecb4c5d),
    ("gnss_raw_gnss_ublox", 9228, 600, 46408673721250, 46468573721250, 0xe6c7a3655ec347a8, 0xe80eb7c67fdfa080),
    ("imu_accelerometer", 6256, 6256, 46408580034294, 46468571920945, 0x21297f2000000000, 0x8c312b8d78935a2b),
    ("imu_gyro", 6256, 6256, 46408580034294, 46468571920945, 0x3d9cecc000000000, 0x8c312b8d78935a2b),
    ("imu_gyro_bias", 6256, 6256, 46408580034294, 46468571920945, 0xebef000000000000, 0x8c312b8d78935a2b),
    ("imu_gyro_uncalibrated", 6256, 6256, 46408580034294, 46468571920945, 0x65e26bc000000000, 0x8c312b8d78935a2b),
    ("imu_magnetometer", 592, 592, 46408610918083, 46468495474412, 0xec9bd13400000000, 0xe1e8f70451ab3f57),
    ("imu_magnetometer_uncalibrated", 592, 592, 46408610918083, 46468495474412, 0xb34f2dab80000000, 0xe1e8f70451ab3f57),
];

fn comma() -> Dataset {
    let mut manifest = "layout = \"streams\"\n".to_owned();
    for (name, ..) in COMMA {
        let columns = match name {
            "camera_frame_pose" => {
                r#"["frame_gps_times", "frame_positions", "frame_velocities", "frame_orientations"]"#
            }
            "can_raw_can" => r#"["address", "src"]"#,
            _ => r#"["value"]"#,
        };
        manifest.push_str(&format!(
            "[streams.{name}]\nfile = \"parquet/{name}.parquet\"\ntime = {{ column = \"t\", unit = \"s\" }}\ncolumns = {columns}\n"
        ));
    }
    manifest.push_str(
        "[streams.can_frames]\nfile = \"parquet/can_raw_can.parquet\"\ntime = { column = \"t\", unit = \"s\" }\ncolumns = [\"data\"]\n",
    );
    open(&real("comma2k19_seg"), &manifest).unwrap()
}

#[test]
fn sixteen_clocks_of_one_drive_are_read_as_pyarrow_reads_them() {
    let dataset = comma();
    assert_eq!((dataset.layout(), dataset.episodes().len()), (&Layout::Streams, 1));
    let all: Vec<usize> = (0..COMMA.len()).collect();
    let streams = dataset.read(&[0], &all).unwrap().remove(0);
    for ((name, _, rows, first, last, values, stamps), stream) in COMMA.into_iter().zip(&streams) {
        assert_eq!((stream.clock.rows(), stream.values.rows), (rows, rows), "{name}");
        assert_eq!((stream.clock.first_ns(), stream.clock.last_ns()), (first, last), "{name}");
        assert_eq!(clock_checksum(stream), stamps, "stamps of {name}");
        assert_eq!(checksum(&stream.values.buffer), values, "values of {name}");
    }
    let span = dataset.span(0).unwrap();
    assert_eq!(span, (46408547498000, 46468577629821));
}

#[test]
fn binary_columns_are_opaque_and_never_decoded() {
    let dataset = comma();
    let frames = position(&dataset, "can_frames");
    assert!(matches!(&dataset.streams()[frames].kind, StreamKind::Opaque { what } if what == "Binary"));
    let error = dataset.read(&[0], &[frames]).unwrap_err();
    assert!(matches!(error, ReadError::Opaque { .. }), "{error}");
    // Its clock is that of the other columns of the same file.
    assert_eq!(dataset.streams()[frames].clock, dataset.streams()[position(&dataset, "can_raw_can")].clock);
    assert_eq!(dataset.clock(0, frames).unwrap().rows(), 84_966);
}

#[test]
fn a_filter_leaves_the_rows_of_one_source() {
    let dataset = open(
        &real("comma2k19_seg"),
        r#"
            layout = "streams"
            [streams.bus]
            file = "parquet/can_raw_can.parquet"
            time = { column = "t", unit = "s" }
            columns = ["address"]
            where = { src = 0, address = 37 }
        "#,
    )
    .unwrap();
    let bus = read(&dataset, 0, "bus").unwrap();
    // pyarrow: t.filter((t["src"] == 0) & (t["address"] == 37)).
    assert_eq!(
        (bus.values.rows, bus.clock.first_ns(), bus.clock.last_ns()),
        (4974, 46408584958854, 46468572208977)
    );
    assert!(bus.values.buffer.as_chunks::<8>().0.iter().all(|address| i64::from_le_bytes(*address) == 37));
}

#[rustfmt::skip]
const HUSKY: [Fact; 6] = [
    ("fix/header", 989, 989, 1432235498039089918, 1432235893228159904, 0xb2b573c9d2fd40f0, 0xef35bf6f2673ab70),
    ("fix/recv", 989, 989, 1432235498039331631, 1432235893228464099, 0xb2b573c9d2fd40f0, 0xef35bfaf3ffb7c8d),
    ("husky_velocity_controller_odom/header", 3952, 3952, 1432235498027976030, 1432235893331706030, 0x15ca434950499d31, 0xfd6256b4299f0d6f),
    ("husky_velocity_controller_odom/recv", 3952, 3952, 1432235498028275834, 1432235893332159182, 0x15ca434950499d31, 0xfd625cefc9fb00c3),
    ("imu_data/header", 11865, 11865, 1432235497988949113, 1432235893280979189, 0xcb52e19dd8ed9983, 0x8c081981bbf337ef),
    ("imu_data/recv", 11865, 11865, 1432235498025043042, 1432235893302031381, 0xcb52e19dd8ed9983, 0x8c13fedeea01d5a1),
];

/// Every floating column packed into one vector, in the order of the file; and every other column alone.
fn husky(extension: &str) -> Dataset {
    let floats = |file: &str| match file {
        "fix" => r#"["latitude", "longitude", "altitude", "position_covariance"]"#,
        "imu_data" => {
            r#"["orientation.x", "orientation.y", "orientation.z", "orientation.w", "orientation_covariance",
                "angular_velocity.x", "angular_velocity.y", "angular_velocity.z", "angular_velocity_covariance",
                "linear_acceleration.x", "linear_acceleration.y", "linear_acceleration.z", "linear_acceleration_covariance"]"#
        }
        _ => {
            r#"["pose.pose.position.x", "pose.pose.position.y", "pose.pose.position.z",
                "pose.pose.orientation.x", "pose.pose.orientation.y", "pose.pose.orientation.z", "pose.pose.orientation.w",
                "pose.covariance", "twist.twist.linear.x", "twist.twist.linear.y", "twist.twist.linear.z",
                "twist.twist.angular.x", "twist.twist.angular.y", "twist.twist.angular.z", "twist.covariance"]"#
        }
    };
    let mut manifest = "layout = \"streams\"\n".to_owned();
    for (name, ..) in HUSKY {
        let (file, clock) = name.split_once('/').unwrap();
        let column = if clock == "recv" { "recv_ns" } else { "header.stamp_ns" };
        manifest.push_str(&format!(
            "[streams.\"{name}\"]\nfile = \"data/{file}.{extension}\"\ntime = {{ column = \"{column}\", unit = \"ns\" }}\ncolumns = {}\n",
            floats(file)
        ));
    }
    for (file, column) in [
        ("fix", "status.status"),
        ("fix", "status.service"),
        ("fix", "position_covariance_type"),
        ("fix", "header.frame_id"),
        ("fix", "recv_ns"),
        ("imu_data", "header.frame_id"),
        ("husky_velocity_controller_odom", "child_frame_id"),
        ("husky_velocity_controller_odom", "header.frame_id"),
    ] {
        manifest.push_str(&format!(
            "[streams.\"{file}/{column}\"]\nfile = \"data/{file}.{extension}\"\ntime = {{ column = \"recv_ns\", unit = \"ns\" }}\ncolumns = [\"{column}\"]\n"
        ));
    }
    open(&real("husky_outdoor"), &manifest).unwrap()
}

#[test]
fn parquet_and_arrow_ipc_of_one_recording_are_equal_bit_for_bit() {
    let (parquet, arrow) = (husky("parquet"), husky("arrow"));
    assert_eq!(parquet.streams(), arrow.streams());
    assert_ne!(parquet.fingerprint(), arrow.fingerprint());
    let all: Vec<usize> = (0..parquet.streams().len()).collect();
    let (from_parquet, from_arrow) = (parquet.read(&[0], &all).unwrap(), arrow.read(&[0], &all).unwrap());
    for ((schema, a), b) in parquet.streams().iter().zip(&from_parquet[0]).zip(&from_arrow[0]) {
        assert_eq!(a.clock, b.clock, "{}", schema.name);
        assert_eq!(
            (a.values.dtype, a.values.dim, a.values.rows),
            (b.values.dtype, b.values.dim, b.values.rows)
        );
        assert_eq!(a.values.buffer.as_slice(), b.values.buffer.as_slice(), "{}", schema.name);
    }
    for ((name, _, rows, first, last, values, stamps), stream) in HUSKY.into_iter().zip(&from_arrow[0]) {
        assert_eq!(stream.clock.rows(), rows, "{name}");
        assert_eq!((stream.clock.first_ns(), stream.clock.last_ns()), (first, last), "{name}");
        assert_eq!((checksum(&stream.values.buffer), clock_checksum(stream)), (values, stamps), "{name}");
    }
    let frame = position(&arrow, "imu_data/header.frame_id");
    assert_eq!(arrow.streams()[frame].kind, StreamKind::Text);
    assert_eq!(arrow.texts(frame).unwrap().to_vec(), parquet.texts(frame).unwrap().to_vec());
    assert_eq!(arrow.texts(frame).unwrap().to_vec(), ["imu_link"]);
}

fn px4(streams: &str) -> String {
    format!("layout = \"streams\"\n{streams}")
}

fn px4_stream(file: &str, columns: &str) -> String {
    format!(
        "[streams.{file}]\nfile = \"parquet/{file}.parquet\"\ntime = {{ column = \"timestamp\", unit = \"us\" }}\ncolumns = {columns}\n"
    )
}

#[test]
fn clocks_that_stand_still_are_refused_and_the_cure_works() {
    let root = real("px4_auavx21");
    for (file, column, stamp, rows) in [
        ("sensor_preflight_0", "accel_inconsistency_m_s_s", 0, 17_072),
        ("ekf2_innovations_0", "heading_innov", 0, 3_271),
        ("commander_state_0", "main_state", 2_069_758_000_i64, 678),
    ] {
        let manifest = px4(&px4_stream(file, &format!("[{column:?}]")));
        let dataset = open(&root, &manifest).unwrap();
        let errors = [
            dataset.read(&[0], &[0]).map(drop).unwrap_err(),
            dataset.span(0).map(drop).unwrap_err(),
            dataset.clock(0, 0).map(drop).unwrap_err(),
        ];
        for error in errors {
            assert!(
                matches!(&error, ReadError::Time(TimeError::AllEqual { rows: found, t_ns, .. }) if (*found, *t_ns) == (rows, stamp)),
                "{error}"
            );
            let text = error.to_string();
            assert!(text.contains(file) && text.contains("time = { rate = .. }"), "{text}");
        }
        let cured = manifest.replace("{ column = \"timestamp\", unit = \"us\" }", "{ rate = 250 }");
        let stream = read(&open(&root, &cured).unwrap(), 0, file).unwrap();
        assert_eq!((stream.clock.rows(), stream.clock.t_ns(1)), (rows, 4_000_000));
        assert!(matches!(stream.clock, Clock::Uniform(_)));
    }
}

#[test]
fn quaternions_and_rates_of_a_flight_keep_their_own_clocks() {
    let manifest = px4(&(px4_stream("vehicle_attitude_0", r#"["q[0]", "q[1]", "q[2]", "q[3]"]"#)
        + "interp = \"slerp\"\n"
        + &px4_stream("vehicle_rates_setpoint_0", r#"["roll", "pitch", "yaw", "thrust"]"#)));
    let dataset = open(&real("px4_auavx21"), &manifest).unwrap();
    let [attitude, rates] = dataset.streams() else { panic!() };
    assert_eq!(
        (attitude.dtype, attitude.shape.as_slice(), attitude.interp),
        (DType::Float32, &[4][..], Some(Interp::Slerp))
    );
    assert_ne!(attitude.clock, rates.clock);
    let read = dataset.read(&[0], &[1, 0]).unwrap().remove(0);
    let (rates, attitude) = (&read[0], &read[1]);
    assert_eq!((attitude.clock.first_ns(), attitude.clock.last_ns()), (112_574_307_000, 181_488_706_000));
    assert_eq!(attitude.values.rows, 6461);
    for q in attitude.values.buffer.as_chunks::<16>().0 {
        let norm: f64 =
            q.as_chunks::<4>().0.iter().map(|bytes| f64::from(f32::from_le_bytes(*bytes)).powi(2)).sum();
        assert!((norm - 1.0).abs() < 1e-5, "{norm}");
    }
    assert_eq!(checksum(&rates.values.buffer), 0xa969ae57c6e34ead);
    assert_eq!(clock_checksum(rates), 0x5b75e02bf3e8c9e0);
}

const OCTO: &str = r#"
    layout = "frames"
    [frames]
    files = "parquet/*.parquet"
    episode = "episode_index"
    time = { rate = 5.0 }
"#;

#[test]
fn frames_without_stamps_are_on_their_declared_rate() {
    let dataset = open(&real("octo_bridge"), OCTO).unwrap();
    assert_eq!((dataset.layout(), dataset.fps()), (&Layout::Frames, Some(5.0)));
    assert_eq!(dataset.episodes().len(), 25);
    for (i, episode) in dataset.episodes().iter().enumerate() {
        assert_eq!((episode.index, episode.frames), (i64::try_from(i).unwrap(), Some(10)));
        assert_eq!(episode.first_frame, Some(i as u64 * 10));
        assert_eq!(dataset.span(i).unwrap(), (0, 1_800_000_000));
    }
    assert_eq!(dataset.units(), [(0..25).collect::<Vec<_>>()]);
    let image = &dataset.streams()[position(&dataset, "observation.images.image_0")];
    assert!(matches!(image.kind, StreamKind::Opaque { .. }), "{image:?}");
    let instruction = position(&dataset, "language_instruction");
    let texts = dataset.texts(instruction).unwrap();
    assert_eq!(texts.len(), 4);
    let streams = [position(&dataset, "observation.state"), position(&dataset, "action"), instruction];
    let all = dataset.read(&dataset.units()[0], &streams).unwrap();
    let joined =
        |k: usize| all.iter().flat_map(|streams| streams[k].values.buffer.to_vec()).collect::<Vec<u8>>();
    assert_eq!(checksum(&joined(0)), 0x0c7dd64090000b75);
    assert_eq!(checksum(&joined(1)), 0x0900e279eceab2f0);
    // One episode read alone, and several out of order, are what they are among all.
    for episodes in [vec![7], vec![24, 3, 7, 3]] {
        for (episode, streams) in episodes.iter().zip(dataset.read(&episodes, &streams).unwrap()) {
            for (k, stream) in streams.iter().enumerate() {
                assert_eq!(stream.values.buffer.as_slice(), all[*episode][k].values.buffer.as_slice());
                assert_eq!(stream.clock.t_ns(9), 1_800_000_000);
            }
        }
    }
    let code = i32::from_le_bytes(*all[7][2].values.buffer.first_chunk().unwrap());
    assert_eq!(texts[usize::try_from(code).unwrap()], "flip pot upright which is in sink");
}

#[test]
fn an_episode_whose_rows_are_not_together_is_refused() {
    // `source_episode_id` counts anew in each part of the recording, so its values come back.
    let error = open(&real("octo_bridge"), &OCTO.replace("episode_index", "source_episode_id")).unwrap_err();
    let text = chain(&error);
    assert!(text.contains("train.parquet") && text.contains("comes back at row"), "{text}");
}

#[test]
fn a_single_table_opens_with_a_manifest() {
    let table = real("octo_bridge").join("parquet/train.parquet");
    let manifest = OCTO.replace("files = \"parquet/*.parquet\"", "")
        + "[streams.state]\ncolumns = [\"observation.state\"]";
    let dataset = open(&table, &manifest).unwrap();
    assert_eq!((dataset.episodes().len(), dataset.streams().len()), (25, 1));
    assert_eq!(checksum(&read(&dataset, 7, "state").unwrap().values.buffer), 0x705738dd9d8f0d07);

    let table = real("husky_outdoor").join("data/imu_data.arrow");
    let manifest = r#"
        layout = "streams"
        [streams.gyro]
        time = { column = "recv_ns", unit = "ns" }
        columns = ["angular_velocity.x", "angular_velocity.y", "angular_velocity.z"]
    "#;
    let dataset = open(&table, manifest).unwrap();
    assert_eq!(dataset.episodes()[0].name, "imu_data.arrow");
    let gyro = read(&dataset, 0, "gyro").unwrap();
    assert_eq!((gyro.values.dim, gyro.values.rows), (3, 11_865));
    assert!(f64s(&gyro.values).iter().all(|value| value.is_finite()));
}

#[test]
fn what_a_manifest_asks_for_and_a_table_has_not_is_named() {
    let root = real("comma2k19_seg");
    let one = |body: &str| format!("layout = \"streams\"\n[streams.a]\n{body}");
    let time = "time = { column = \"t\", unit = \"s\" }\n";
    for (manifest, wanted) in [
        (one(&format!("file = \"parquet/none.parquet\"\n{time}")), &["none.parquet", "missing"][..]),
        (one(&format!("file = \"parquet/can_speed.parquet\"\n{time}")), &["no column \"a\"", "\"value\""]),
        (
            one("file = \"parquet/can_speed.parquet\"\ncolumns = [\"value\"]\ntime = { column = \"t\" }"),
            &["\"t\"", "unit"],
        ),
        (
            one(
                "file = \"parquet/can_raw_can.parquet\"\ncolumns = [\"src\"]\ntime = { column = \"data\", unit = \"s\" }",
            ),
            &["\"data\" is Binary"],
        ),
        (
            one(&format!(
                "file = \"parquet/can_raw_can.parquet\"\ncolumns = [\"src\"]\n{time}where = {{ src = \"x\" }}"
            )),
            &["\"src\" = \"x\" cannot hold", "Int64"],
        ),
        (
            one(&format!(
                "file = \"parquet/can_raw_can.parquet\"\ncolumns = [\"src\"]\n{time}duplicates = \"mean\""
            )),
            &["line 2", "\"mean\" needs floating elements", "int64"],
        ),
        (
            one(&format!(
                "file = \"parquet/can_raw_can.parquet\"\ncolumns = [\"src\"]\n{time}interp = \"linear\""
            )),
            &["line 2", "\"linear\" needs floating"],
        ),
        (
            one(&format!(
                "file = \"parquet/imu_gyro.parquet\"\ncolumns = [\"value\"]\n{time}interp = \"slerp\""
            )),
            &["line 2", "four floating elements", "[3]"],
        ),
        (
            one(&format!("file = \"parquet/can_raw_can.parquet\"\ncolumns = [\"src\", \"t\"]\n{time}")),
            &["\"t\" should hold int64", "Float64"],
        ),
        (one("file = \"parquet\"\nrate = 1.0"), &["parquet", "missing"]),
    ] {
        let text = chain(&open(&root, &manifest).unwrap_err());
        assert!(wanted.iter().all(|part| text.contains(part)), "{manifest}\n-> {text}");
    }
    let none = one(&format!(
        "file = \"parquet/can_raw_can.parquet\"\ncolumns = [\"src\"]\n{time}where = {{ src = 77 }}"
    ));
    let text = chain(&open(&root, &none).unwrap().read(&[0], &[0]).unwrap_err());
    assert!(text.contains("none of 135468 rows has \"src\" = 77"), "{text}");
    let text = chain(&Dataset::open(Path::new("/"), &Default::default()).unwrap_err());
    assert!(text.contains("robocache.toml"), "{text}");
}
