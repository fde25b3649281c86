//! Cutting and joining against each other and against packets built one by one.

use std::net::IpAddr;

use crate::offload::{outbound, Coalescer, Segmenter, Span, VnetHdr};
use crate::packet::{build, parse, transport, transport_sum_ok, TCP, UDP};
use crate::sim::{Memory, Rng};

const ACK: u8 = 16;
const PSH: u8 = 8;

fn ips(v6: bool) -> (IpAddr, IpAddr) {
    if v6 {
        ("fd00::1".parse().unwrap(), "fd00::2".parse().unwrap())
    } else {
        ("10.0.0.1".parse().unwrap(), "10.0.0.2".parse().unwrap())
    }
}

fn payload(n: usize) -> Vec<u8> {
    (0..n as u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8).collect()
}

/// What the stack would send without offload. IPv4 ids count up, as segmentation does.
fn stream(v6: bool, proto: u8, data: &[u8], mss: usize, last_flags: u8) -> Vec<Vec<u8>> {
    let (s, d) = ips(v6);
    let n = data.len().div_ceil(mss);
    data.chunks(mss)
        .enumerate()
        .map(|(i, part)| {
            let flags = if i + 1 == n { last_flags } else { ACK };
            let mut p = build::l4(s, d, proto, 1000 + (i * mss) as u32, flags, part);
            if !v6 {
                p[4..6].copy_from_slice(&(i as u16).to_be_bytes());
                crate::packet::fix_ipv4_header(&mut p);
            }
            p
        })
        .collect()
}

/// Joins packets and returns the resulting writes.
fn join(packets: &[Vec<u8>]) -> Vec<(VnetHdr, Vec<u8>)> {
    let mut mem = Memory(packets.to_vec());
    let mut c = Coalescer::new(true, true);
    for (buf, p) in packets.iter().enumerate() {
        c.push(&mem, Span { buf, off: 0, len: p.len() });
    }
    c.finish(&mut mem);
    use crate::offload::Buffers;
    c.groups()
        .iter()
        .map(|g| (g.vnet, g.spans.iter().flat_map(|s| mem.bytes(*s).to_vec()).collect()))
        .collect()
}

/// Cuts a superpacket as the transmit path does, wiping each piece as sealing would not.
fn cut(h: &VnetHdr, packet: &[u8]) -> Vec<Vec<u8>> {
    let mut buf = packet.to_vec();
    let mut s = Segmenter::default();
    match outbound(h, &mut buf, &mut s) {
        Some(false) => vec![buf],
        Some(true) => (0..s.count)
            .map(|i| {
                let at = s.prepare(i, &mut buf);
                buf[at..at + s.len(i)].to_vec()
            })
            .collect(),
        None => Vec::new(),
    }
}

#[test]
fn joining_then_cutting_gives_the_same_packets() {
    for v6 in [false, true] {
        for proto in [TCP, UDP] {
            for (len, mss) in
                [(1, 100), (100, 100), (101, 100), (5000, 1368), (60_000, 1368), (3000, 60), (700, 7)]
            {
                let data = payload(len);
                let packets = stream(v6, proto, &data, mss, ACK | PSH);
                let joined = join(&packets);
                let back: Vec<Vec<u8>> = joined.iter().flat_map(|(h, p)| cut(h, p)).collect();
                assert_eq!(back, packets, "v6 {v6} proto {proto} len {len} mss {mss}");
                assert_eq!(
                    joined.len(),
                    packets.len().div_ceil(128),
                    "one write per 128: {v6} {proto} {len} {mss}"
                );
            }
        }
    }
}

#[test]
fn tails_and_interleaved_flows() {
    let a = stream(false, TCP, &payload(3000), 1000, ACK);
    let b = stream(true, TCP, &payload(2500), 1000, ACK);
    let mixed: Vec<Vec<u8>> = vec![&a[0], &b[0], &a[1], &b[1], &a[2], &b[2]].into_iter().cloned().collect();
    let joined = join(&mixed);
    assert_eq!(joined.len(), 2);
    assert_eq!(cut(&joined[0].0, &joined[0].1), a);
    assert_eq!(cut(&joined[1].0, &joined[1].1), b);
}

#[test]
fn what_must_not_be_joined_is_not() {
    let base = stream(false, TCP, &payload(2000), 1000, ACK);
    let (s, d) = ips(false);
    let seq = |q: u32, flags: u8, data: &[u8]| build::l4(s, d, TCP, q, flags, data);
    let two = |second: Vec<u8>| join(&[base[0].clone(), second]).len();
    assert_eq!(two(base[1].clone()), 1, "positive control");
    assert_eq!(two(seq(2001, ACK, &payload(1000))), 2, "gap");
    assert_eq!(two(seq(1000, ACK, &payload(1000))), 2, "repeat");
    assert_eq!(two(seq(2000, ACK, &payload(1001))), 2, "larger than the first");
    for flags in [ACK | 1, ACK | 2, ACK | 4, ACK | 32, ACK | 64, ACK | 128, 0] {
        assert_eq!(two(seq(2000, flags, &payload(1000))), 2, "flags {flags:#x}");
    }
    let edit = |f: &dyn Fn(&mut Vec<u8>)| {
        let mut p = base[1].clone();
        f(&mut p);
        crate::packet::fix_ipv4_header(&mut p);
        // Keep the transport checksum right unless the edit is about it.
        let t = transport(&p).unwrap();
        p[t.ip_len + 16..t.ip_len + 18].fill(0);
        let sum = crate::packet::pseudo_sum(&p, false, TCP, p.len() - 20) + crate::packet::sum(&p[20..]);
        crate::packet::put_sum(&mut p, 36, !crate::packet::fold(sum));
        p
    };
    assert_eq!(two(edit(&|_| ())), 1, "positive control");
    assert_eq!(two(edit(&|p| p[1] = 3)), 2, "ECN mark");
    assert_eq!(two(edit(&|p| p[8] = 9)), 2, "TTL");
    assert_eq!(two(edit(&|p| p[6] = 0)), 2, "DF");
    assert_eq!(two(edit(&|p| p[31] = 9)), 2, "acknowledgement");
    assert_eq!(two(edit(&|p| p[34] = 9)), 2, "window");
    assert_eq!(two(edit(&|p| p[50] = 9)), 2, "timestamp option");
    let mut broken = base[1].clone();
    *broken.last_mut().unwrap() ^= 1;
    let joined = join(&[base[0].clone(), broken.clone()]);
    assert_eq!(joined.len(), 2, "a wrong checksum stays visible");
    assert_eq!(joined[1], (VnetHdr::default(), broken));
    let (ps, acks) = (stream(false, TCP, &payload(1000), 1000, ACK | PSH), seq(2000, ACK, &payload(1000)));
    assert_eq!(join(&[ps[0].clone(), acks]).len(), 2, "nothing follows a push");
    assert_eq!(join(&[seq(1, ACK, &[]), seq(1, ACK, &[])]).len(), 2, "bare acknowledgements");
    let u = stream(false, UDP, &payload(300), 100, ACK);
    let mut no_sum = u[1].clone();
    no_sum[26..28].fill(0);
    assert_eq!(join(&[u[0].clone(), no_sum]).len(), 2, "UDP without checksum");
}

#[test]
fn order_within_a_flow_is_kept() {
    let mut rng = Rng(3);
    for _ in 0..300 {
        let data = payload(4000);
        let mut packets = stream(false, TCP, &data, 200, ACK);
        for _ in 0..rng.below(6) {
            let (i, j) = (rng.below(20) as usize, rng.below(20) as usize);
            packets.swap(i, j);
        }
        let out: Vec<Vec<u8>> = join(&packets).iter().flat_map(|(h, p)| cut(h, p)).collect();
        let seqs = |v: &[Vec<u8>]| v.iter().map(|p| crate::packet::be32(p, 24)).collect::<Vec<_>>();
        assert_eq!(seqs(&out), seqs(&packets));
        assert!(out.iter().all(|p| transport_sum_ok(p, &transport(p).unwrap())));
    }
}

#[test]
fn partial_checksums_are_completed() {
    for v6 in [false, true] {
        let (s, d) = ips(v6);
        for proto in [TCP, UDP] {
            let good = build::l4(s, d, proto, 1, ACK, b"some payload");
            let ip_len = if v6 { 40 } else { 20 };
            let at = if proto == TCP { 16 } else { 6 };
            let mut p = good.clone();
            let partial = crate::packet::fold(crate::packet::pseudo_sum(&p, v6, proto, p.len() - ip_len));
            crate::packet::put_sum(&mut p, ip_len + at, partial);
            let h =
                VnetHdr { flags: 1, csum_start: ip_len as u16, csum_offset: at as u16, ..VnetHdr::default() };
            assert_eq!(cut(&h, &p), [good]);
        }
    }
}

#[test]
fn hostile_headers_never_panic() {
    let mut rng = Rng(9);
    for round in 0..100_000u32 {
        let v6 = round % 2 == 0;
        let mut p = stream(v6, if round % 4 < 2 { TCP } else { UDP }, &payload(300), 300, ACK).remove(0);
        for _ in 0..rng.below(6) {
            let at = rng.below(80.min(p.len() as u64)) as usize;
            p[at] = rng.below(256) as u8;
        }
        p.truncate(1 + rng.below(p.len() as u64) as usize);
        let h = VnetHdr {
            flags: rng.below(4) as u8,
            gso_type: [0, 1, 4, 5, 3, 0x81, 0xff][rng.below(7) as usize],
            hdr_len: rng.below(400) as u16,
            gso_size: [0, 1, 7, 100, 65_535][rng.below(5) as usize],
            csum_start: [0, 20, 40, 41, 300, 65_535][rng.below(6) as usize],
            csum_offset: [0, 6, 16, 65_535][rng.below(4) as usize],
        };
        for s in cut(&h, &p) {
            assert!(s.len() <= p.len());
        }
        if let Some(i) = parse(&p) {
            p.truncate(i.len);
            join(&[p.clone(), p.clone(), p]);
        }
    }
}

#[test]
fn virtio_header_round_trip() {
    let h = VnetHdr { flags: 1, gso_type: 4, hdr_len: 72, gso_size: 1348, csum_start: 40, csum_offset: 16 };
    assert_eq!(VnetHdr::read(&h.bytes()), h);
}
